"""What stands under the figures of `jaxldm inspect`: how they are made, and what one sees in them."""

ATTENTION = (
    "In an attention layer every patch of the image asks all patches for what it needs. Each head computes "
    "one weight for each pair, softmax(q k / sqrt(d)); the weights of a patch add up to 1. The maps below "
    "are these weights, as the layer used them, laid over the image: dark is 0, bright is the largest weight "
    "of that row of maps."
)
ATTENTION_INPUT = (
    "The network saw the images with noise of {noise:g} times their own strength added, as in the middle of "
    "drawing, and was given their class or caption. Rows are layers from input to output, columns are heads; "
    "the first map of a row is their mean."
)
FROM_ONE = (
    "{what}, seen from one patch (blue frame): how much it takes from each patch. The scale of a row is at "
    "its right. Over how many patches a patch spreads its weight, on average: {reach}."
)
AVERAGED = (
    "{what}, averaged over all patches: how much each patch is looked at. If all were looked at alike, each "
    "would have 1 / {number} = {even:.3f} in the first row."
)
ATTENTION_SEEN = (
    "What to look for: heads that take most from the patch itself and its neighbours act like a convolution. "
    "Heads that follow the stroke, or jump to its other end, carry what the parts of the shape must agree "
    "on. A map that is even everywhere is a head that only averages the image. Where all patches look at one "
    "empty corner, the head has parked its weight: it has nothing to say there."
)
CAPTION = (
    "Every patch of the image asks the words of the caption what belongs there. A map shows for one word how "
    "much of a patch's weight goes to its tokens, averaged over the heads; rows are layers."
)
CAPTION_SEEN = (
    "In a trained model nouns light up where their thing is, and adjectives follow their noun. A map that is "
    "even says that the word is asked everywhere alike. Much of the weight may go to the tokens at the start "
    "and the end of every text, which are not shown: it is where a patch looks that needs no word."
)
LATENTS = (
    "The denoising network never sees pixels: it draws these numbers, and the autoencoder's decoder turns "
    "them into an image. Sampling starts from N(0, 1), so channels that have about mean 0 and standard "
    "deviation 1 are easiest to learn: then the same noise is as strong in each of them."
)
LATENTS_SEEN = (
    "A standard deviation far below 1 in one channel: the autoencoder does not use it (posterior collapse). "
    "All of them far from 1: the scaling factor is wrong. A tall narrow hill is the background, which is the "
    "same in most images; what a channel says of the foreground is in its tails."
)
PIXELS = (
    "This network draws pixels. They are far from a normal distribution: most of them are at one end. That "
    "is allowed, but a schedule of noise that fits latents need not fit them."
)
TSNE = (
    "Each patch is a vector of many numbers inside of the network. t-SNE lays such vectors out in the plane "
    "so that neighbours stay neighbours; colour is the class of the image that a patch is from. The network "
    "was not given the class here, so what sorts the points is what it read in the image."
)
TSNE_SEEN = (
    "In a trained network colours are mixed at the left: a patch alone, a piece of a stroke, does not say "
    "which class it is from. Further inside, attention and convolutions have mixed each patch with the "
    "others: where colours gather, the network has recognised the class without being asked to. Distances "
    "between far groups and the size of a group mean nothing in t-SNE, nor do the axes."
)
CHECKPOINTS = (
    "The same noise and the same {kind}, drawn by the network as it was at each checkpoint that the run "
    "keeps: its moving average, DDIM in {steps} steps, guidance scale {scale:g}."
)
DISTANCES = (
    "The Fréchet distance compares means and covariances of features of generated and of real images. It is "
    "0 only for equal ones."
)
PIXEL_DISTANCES = (
    "This run has no finished classifier whose features could be compared, and pixels are compared in their "
    "place: along 1 000 random directions, how far generated images must be moved to lie as real ones do, "
    "squared and averaged. It sees brightness, colours and where things are, and not what they are."
)
DISTANCES_SEEN = (
    "With so few images two sets of real images have the distance of the dashed line. Falling means that "
    "training still helps; flat near the floor, that it is done; rising while the "
    "share of readable images still grows, that the model draws ever fewer kinds of images. Compare numbers "
    "of this page only with each other: they depend on how many images were drawn."
)
