"""The PickScore reward of Flow-GRPO: how well would people like the image for its prompt?

The file stands alone. Copy it, `pip install torch torchvision transformers`, and run:

    import pickscore, torchvision
    image = torchvision.io.decode_image("cat.png", "RGB") / 255
    pickscore.reward(image[None], ["a photo of a cat"], [{}])

Kirstain et al., Pick-a-Pic, arXiv 2305.01569: a CLIP ViT-H-14 trained on people's choices between two images.
"""

import functools

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

PICKSCORE, PICKSCORE_PROCESSOR = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
DEVICE, DTYPE = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)


@functools.cache
def pickscore_model():
    model = CLIPModel.from_pretrained(PICKSCORE, dtype=DTYPE)
    return model.to(DEVICE).eval(), CLIPProcessor.from_pretrained(PICKSCORE_PROCESSOR)


@torch.no_grad()
def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """PickScore [B] of images [B, 3, H, W] in 0..1: logit_scale * cos(text, image).

    It is divided by 26 to be near 0..1, as in the code of Flow-GRPO's authors, yifan123/flow_grpo.
    """
    model, processor = pickscore_model()
    inputs = processor(
        text=list(prompts), images=list(images), do_rescale=False,  # The images are in 0..1 already.
        padding="max_length", truncation=True, max_length=77, return_tensors="pt",
    ).to(DEVICE)  # fmt: skip
    inputs["pixel_values"] = inputs["pixel_values"].to(DTYPE)
    out = model(**inputs)  # unit embeddings
    cosine = (out.text_embeds.float() * out.image_embeds.float()).sum(1)
    return model.logit_scale.float().exp() * cosine / 26
