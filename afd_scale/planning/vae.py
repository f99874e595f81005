"""Wan 2.1's VAE as it decodes in float32: counted from diffusers' AutoencoderKLWan on the meta device, which tests do
again."""

FRAMES, PIXELS = 4, 8  # that it makes of a latent frame (of the first, one), along a latent's side
DECODE_FLOPS_PER_PIXEL = 8.51e6  # of each frame
DECODE_BYTES_PER_PIXEL = 19_550  # of one frame: the peak of decoding a latent frame, what is kept for the next included
WEIGHT_BYTES = 4 * 126_892_531
WHOLE_FRAME_PIXELS = 1280 * 720  # larger frames are decoded in tiles, which take less


def frames_of(latent_frames: int) -> int:
    """Of a video of so many latent frames."""
    return 1 + (latent_frames - 1) * FRAMES
