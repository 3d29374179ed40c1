"""The PickScore reward of Flow-GRPO asks how well people would like the image for its prompt.

The file stands alone. Copy it, `pip install torch torchvision transformers`, and run:

    import pickscore, torchvision
    image = torchvision.io.decode_image("cat.png", "RGB") / 255
    pickscore.reward(image[None], ["a photo of a cat"], [{}])

Kirstain et al., Pick-a-Pic, arXiv 2305.01569, trained a CLIP ViT-H-14 on people's choices between
two images.
"""

import functools

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# "cuda" is the GPU of this process, where it called torch.cuda.set_device, as under torchrun.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


@functools.cache
def pickscore_model():
    """PickScore's CLIP, in half precision on a GPU, and its processor of images and texts."""
    model = CLIPModel.from_pretrained(PICKSCORE, dtype=DTYPE)
    processor = CLIPProcessor.from_pretrained(PICKSCORE_PROCESSOR)
    return model.to(DEVICE).eval(), processor


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """PickScore [B] of images [B, 3, H, W] in 0..1, which is logit_scale * cos(text, image).

    It is divided by 26 to be near 0..1, as in the code of Flow-GRPO's authors, yifan123/flow_grpo.
    """
    model, processor = pickscore_model()
    inputs = processor(
        text=list(prompts),
        images=list((images * 255).round().byte()),
        padding="max_length",
        truncation=True,
        max_length=77,
        return_tensors="pt",
    )
    inputs = inputs.to(DEVICE)
    inputs["pixel_values"] = inputs["pixel_values"].to(DTYPE)
    output = model(**inputs)  # Its embeddings have length 1.
    products = output.text_embeds.float() * output.image_embeds.float()
    return model.logit_scale.float().exp() * products.sum(1) / 26
