"""The CLIPScore reward asks how well the image fits its prompt.

The file stands alone. Copy it, `pip install torch torchvision open_clip_torch`, and run:

    import clipscore, torchvision
    image = torchvision.io.decode_image("cat.png", "RGB") / 255
    clipscore.reward(image[None], ["a photo of a cat"], [{}])

Hessel et al., CLIPScore, arXiv 2104.08718, with ViT-L-14 in place of ViT-B/32, and without the
factor of 2.5 and the floor at 0.
"""

import functools

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

CLIP = "ViT-L-14-quickgelu"  # OpenAI trained it with the QuickGELU activation.
CLIP_WEIGHTS = "openai"
# "cuda" is the GPU of this process, where it called torch.cuda.set_device, as under torchrun.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@functools.cache
def clip_model():
    """CLIP, in half precision on a GPU, and its tokenizer."""
    model = open_clip.create_model(CLIP, CLIP_WEIGHTS, device=DEVICE)
    tokenizer = open_clip.get_tokenizer(CLIP)
    return model.to(DTYPE).eval(), tokenizer


def clip_pixels(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in 0..1 of any size as CLIP sees them, cut to their central squares."""
    model, _ = clip_model()
    size = model.visual.image_size[0]
    settings = model.visual.preprocess_cfg
    pixels = transforms.resize(images, [size], InterpolationMode.BICUBIC, antialias=True)
    pixels = transforms.center_crop(pixels.clamp(0, 1), [size])
    pixels = transforms.normalize(pixels, settings["mean"], settings["std"])
    return pixels.to(DEVICE, DTYPE)


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """The cosines [B] of CLIP's embeddings of images [B, 3, H, W] in 0..1 with their prompts'."""
    model, tokenizer = clip_model()
    tokens = tokenizer(list(prompts)).to(DEVICE)
    image_embeddings = model.encode_image(clip_pixels(images)).float()
    text_embeddings = model.encode_text(tokens).float()
    return F.cosine_similarity(image_embeddings, text_embeddings)
