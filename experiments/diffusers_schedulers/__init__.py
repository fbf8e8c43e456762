"""Every scheduler of diffusers that is read, with every entry of its signature, against the reference."""
