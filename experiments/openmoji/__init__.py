"""OpenMoji: does a small text-to-image model draw the picture of a name?"""
