"""The CLIPScore reward: how well does the image fit its prompt?

The file stands alone. Copy it, `pip install torch torchvision open_clip_torch`, and run:

    import clipscore, torchvision
    image = torchvision.io.decode_image("cat.png", "RGB") / 255
    clipscore.reward(image[None], ["a photo of a cat"], [{}])

Hessel et al., CLIPScore, arXiv 2104.08718, with ViT-L-14 in place of ViT-B/32, without the factor of 2.5
and the floor at 0.
"""

import functools

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import functional as transforms

CLIP, CLIP_WEIGHTS = "ViT-L-14-quickgelu", "openai"  # OpenAI trained it with the QuickGELU activation.
DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


@functools.cache
def clip_model():
    model = open_clip.create_model(CLIP, CLIP_WEIGHTS, device=DEVICE)
    return model.to(DTYPE).eval(), open_clip.get_tokenizer(CLIP)


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """The cosine [B] between CLIP's embeddings of images [B, 3, H, W] in 0..1 and of their prompts."""
    model, tokenizer = clip_model()
    size, settings = model.visual.image_size[0], model.visual.preprocess_cfg
    pixels = transforms.resize(images, [size], transforms.InterpolationMode.BICUBIC, antialias=True)
    pixels = transforms.center_crop(pixels.clamp(0, 1), [size])
    pixels = transforms.normalize(pixels, settings["mean"], settings["std"])
    image = model.encode_image(pixels.to(DEVICE, DTYPE))
    text = model.encode_text(tokenizer(list(prompts)).to(DEVICE))
    return F.cosine_similarity(image.float(), text.float())
