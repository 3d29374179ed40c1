"""Evaluation, what a rollout draws and for whom, the adapter, and averages of scores."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import flow_grpo
from tests.small import (
    PROMPTS,
    close,
    copied,
    is_standard_normal,
    joined,
    normal,
    small_run,
    stock_images,
)


def redness(images):
    return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def multiply_average(run, factor):
    for average in run.ema.shadow_params:
        average.mul_(factor)


def autograd_modes(module):
    """A set that grows by whether autograd is on in a pass of the module."""
    modes = set()

    def add_mode(*_):
        modes.add(torch.is_grad_enabled())

    module.register_forward_pre_hook(add_mode)
    return modes


# ---- Evaluation.
MODELS = {
    "with T5": ("with-T5", 3.5),
    "without T5": ("without-T5", 3.5),
    "without guidance": ("with-T5", 1.0),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def evaluated(request, model, work):
    """A run whose adapter, its average, and the base model draw three different images."""
    name, guidance_scale = request.param
    folder = model.with_name(name)
    run = small_run(folder, guidance_scale=guidance_scale)
    multiply_average(run, 1.5)
    return SimpleNamespace(run=run, folder=folder, base=stock_images(folder, run))


def test_with_an_average_of_zero_evaluation_draws_the_stock_models_images(evaluated):
    run = evaluated.run
    multiply_average(run, 0)
    _, images = flow_grpo.evaluate(run, run.eval_records)
    close(images, evaluated.base, rtol=0, atol=1e-4)
    assert images.std() > 0.01


def test_the_stock_pipeline_draws_an_evaluations_images_with_the_saved_weights(evaluated):
    run = evaluated.run
    _, images = flow_grpo.evaluate(run, run.eval_records)
    flow_grpo.save(run)
    close(images, stock_images(evaluated.folder, run, lora="out"), rtol=0, atol=1e-4)
    assert not torch.allclose(images, evaluated.base, atol=1e-2)


def write_a_part(path):
    path.write_bytes(b"a part")
    raise KeyboardInterrupt


def test_a_part_of_a_file_is_not_taken_for_weights(model, work):
    flow_grpo.save(small_run(model))
    with pytest.raises(KeyboardInterrupt):
        flow_grpo.write_file(Path("out/pytorch_lora_weights.safetensors"), write_a_part)
    assert len(list(Path("out").glob("*.safetensors"))) == 1


def test_the_saved_weights_are_the_average_and_need_no_scale(model, work):
    run = small_run(model)
    multiply_average(run, 1.5)
    flow_grpo.save(run)
    saved = load_file("out/pytorch_lora_weights.safetensors")
    trained = [n for n, p in run.pipe.transformer.named_parameters() if p.requires_grad]
    assert len(saved) == len(trained)
    for name, average in zip(trained, run.ema.shadow_params):
        scale = 2 if "lora_B" in name else 1  # alpha / rank
        key = "transformer." + name.replace(".default", "")
        close(saved[key], scale * average)


PAIR = [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize("use", [flow_grpo.save, lambda run: flow_grpo.evaluate(run, PAIR)])
def test_saving_and_evaluation_leave_the_adapter_as_it_was(model, work, use):
    run = small_run(model)
    multiply_average(run, 0)
    before = copied(run.parameters)
    use(run)
    assert all(map(torch.equal, run.parameters, before))


def test_evaluation_scores_its_images(model, work):
    run = small_run(model)
    function = run.reward.function
    seen = []

    def reward(images, prompts, records):
        seen.extend(records)
        return function(images, prompts, records)

    run.reward.function = reward
    means, images = flow_grpo.evaluate(run, run.eval_records)
    red = redness(images).mean().item()
    assert means == pytest.approx({"eval_reward": red, "eval_rewards": red})
    assert seen == run.eval_records


def test_evaluation_averages_within_each_tag_first(model, work):
    run = small_run(model)
    run.reward.function = lambda images, *_: [1.0, 0.0, 0.5][: len(images)]
    tags = ["counting", "position", "counting"]
    records = [{"prompt": "a", "tag": tag} for tag in tags]
    means, _ = flow_grpo.evaluate(run, records)
    assert means["eval_reward"] == (0.75 + 0) / 2


def test_evaluation_has_no_graph(model, work):
    run = small_run(model)
    modes = autograd_modes(run.pipe.transformer)
    flow_grpo.evaluate(run, PAIR)
    assert modes == {False}


def test_the_largest_images_are_those_of_the_networks_positions(model, work):
    assert small_run(model, height=32).latent_shape == (4, 16, 8)


def test_images_have_the_height_and_width_that_were_asked_for(model, work):
    _, images = flow_grpo.evaluate(small_run(model, height=12, width=20), PAIR)
    assert images.shape == (2, 3, 12, 20)


def test_evaluation_returns_the_first_16_images_whatever_the_batch_size(model, work):
    run = small_run(model, batch_size=12)
    records = run.eval_records * 9
    means, images = flow_grpo.evaluate(run, records)
    run.config.batch_size = 36
    means_at_once, images_at_once = flow_grpo.evaluate(run, records)
    assert images.shape == (16, 3, 16, 16)
    close(images, images_at_once, rtol=0, atol=1e-4)
    assert means == pytest.approx(means_at_once, abs=1e-5)


def test_the_first_records_have_the_same_images_without_the_others(model, work):
    run = small_run(model)
    _, images = flow_grpo.evaluate(run, run.eval_records)
    _, first = flow_grpo.evaluate(run, run.eval_records[:2])
    close(first, images[:2], rtol=0, atol=1e-4)


# ---- What a rollout draws.
def prompts_of(samples):
    return [record["prompt"] for record in samples.records]


def rollout_at_once(velocity, x, times, levels, generator):
    """In place of `rollout`: latents that stay noise."""
    return torch.stack([x] * len(times), 1), torch.zeros(len(x), len(levels))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(flow_grpo, "rollout", rollout_at_once)


def test_all_images_of_all_epochs_and_seeds_begin_with_noise_of_their_own(model, work, quick):
    run = small_run(model)
    noise = []
    for run.config.seed, run.epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        noise.append(flow_grpo.sample(run).latents[:, 0].flatten(1))
    similar = torch.corrcoef(torch.cat(noise)) > 0.5
    assert torch.equal(similar, torch.eye(4 * 8).bool())


def test_image_12_of_epoch_1_begins_with_other_noise_than_image_2_of_epoch_11(model, work, quick):
    run = small_run(model, group_size=24, batch_size=2)
    run.epoch = 1
    first = flow_grpo.sample(run).latents[12, 0]
    run.epoch = 11
    second = flow_grpo.sample(run).latents[2, 0]
    assert not torch.equal(first, second)


def test_the_noise_of_a_rollout_is_standard_normal(model, work, quick):
    noise = flow_grpo.sample(small_run(model, group_size=24)).latents[:, 0]
    is_standard_normal(noise)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_rollout_has_autograd_on_if_it_is_compiled(model, work, compiled):
    run = small_run(model)
    run.config.compile = compiled
    modes = autograd_modes(run.pipe.transformer.norm_out)
    samples = flow_grpo.sample(run)
    assert modes == {compiled, False}  # With guidance, the empty prompt never has a graph.
    assert not samples.latents.requires_grad
    assert not samples.log_probs.requires_grad


ORDERS = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]  # seed, epoch


@pytest.fixture
def orders(model, work, quick):
    """The prompts of the 20 images of epochs of 5 prompts, where the file has 4."""
    run = small_run(model, prompts_per_epoch=5)
    prompts = []
    for run.config.seed, run.epoch in ORDERS:
        prompts.append(prompts_of(flow_grpo.sample(run)))
    assert [record["prompt"] for record in run.train_records] == PROMPTS[:4]
    return prompts


def test_a_groups_images_have_one_prompt_and_lie_in_a_row(orders):
    for prompts in orders:
        assert prompts == [prompt for prompt in prompts[::4] for _ in range(4)]


def test_all_prompts_are_taken_before_one_comes_again(orders):
    for prompts in orders:
        assert sorted(prompts[:16:4]) == PROMPTS[:4]


def test_the_prompts_order_depends_on_seed_and_epoch(orders):
    assert orders[0] == orders[4]
    assert len({tuple(prompts) for prompts in orders}) == 4


# ---- Texts.
def test_an_epoch_encodes_each_text_once(model, work):
    run = small_run(model)
    run.pipe.encode_prompt = Mock(side_effect=run.pipe.encode_prompt)
    samples = flow_grpo.sample(run)
    flow_grpo.optimize(run, samples)
    encoded = [text for call in run.pipe.encode_prompt.mock_calls for text in call.args[0]]
    assert sorted(encoded) == ["", *sorted(set(prompts_of(samples)))]


def test_each_of_many_prompts_has_its_own_text(model, work):
    run = small_run(model)
    prompts = [f'a "{i}"' for i in range(150)]
    texts = flow_grpo.encode(run, [{"prompt": prompt} for prompt in prompts])
    assert texts.keys() == {"", *prompts}
    for prompt in ("", *prompts[::10]):
        alone = flow_grpo.encode(run, [{"prompt": prompt}])[prompt]
        close(texts[prompt], alone)
    different = torch.stack([pooled for _, pooled in texts.values()]).unique(dim=0)
    assert len(different) == 151


# ---- Images, and the reward that sees them.
def decoded(run, samples):
    vae = run.pipe.vae
    latents = samples.latents[:, -1] / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def test_a_reward_scores_each_image_with_its_prompt(model, work):
    run = small_run(model)
    seen = []

    def reward(images, prompts, records):
        seen.extend(zip(images, prompts, records))
        return redness(images)

    run.reward.function = reward
    samples = flow_grpo.sample(run)
    images, prompts, records = zip(*seen)
    expected = decoded(run, samples)
    close(torch.stack(images), expected)
    assert list(prompts) == prompts_of(samples)
    assert list(records) == samples.records
    close(samples.columns["reward"], redness(expected))
    assert redness(expected).std() > 1e-3


def test_rewards_may_be_whole_numbers(model, work, quick):
    run = small_run(model)
    run.reward.function = lambda images, *_: [1, 0, 0][: len(images)]
    rewards = flow_grpo.sample(run).columns["reward"]
    assert rewards.tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    assert rewards.dtype == torch.float32


def test_decoding_has_no_graph(model, work):
    run = small_run(model)
    run.pipe.vae.requires_grad_()
    assert not flow_grpo.decode(run.pipe.vae, normal(1, *run.latent_shape)).requires_grad


def test_a_reward_may_view_images_as_rows(model, work):
    """In memory, the autoencoder's channels come last."""
    run = small_run(model)
    images = flow_grpo.decode(run.pipe.vae, normal(2, *run.latent_shape))
    assert images.view(2, -1).shape == (2, images[0].numel())


def test_images_are_in_0_to_1(model, work):
    run = small_run(model)
    images = flow_grpo.decode(run.pipe.vae, 100 * normal(2, *run.latent_shape))
    assert images.min() == 0
    assert images.max() == 1


# ---- The adapter: W + alpha / rank B A in place of W.
@pytest.fixture
def fresh(model, work):
    """A run whose adapter has done nothing yet, in a small window."""
    return small_run(model, active=False, sde_steps=2, sde_last_step=2)


ENDS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
PLACES = [f"transformer_blocks.{i}.attn.{end}" for i in (0, 1) for end in ENDS]


def test_the_adapter_is_where_the_authors_have_it(fresh):
    transformer = fresh.pipe.transformer
    named = [(name, p) for name, p in transformer.named_parameters() if p.requires_grad]
    # The last block has no to_add_out, and the second attention of the first has no adapter.
    assert {name.split(".lora_")[0] for name, _ in named} == set(PLACES[:-1])
    assert transformer.transformer_blocks[0].attn2 is not None
    assert [id(p) for _, p in named] == [id(p) for p in fresh.parameters]


def test_the_adapter_is_in_float32_and_its_alpha_is_twice_its_rank(model, work):
    run = small_run(model, half=True)
    assert {p.dtype for p in run.parameters} == {torch.float32}
    layer = run.pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.weight.dtype == torch.float16
    assert layer.lora_A["default"].weight.shape == (4, 16)
    assert layer.scaling == {"default": 2.0}


def test_the_adapter_begins_gaussian_and_without_effect(fresh):
    """B = 0, and A is of N(0, 1 / rank^2)."""
    named = list(fresh.pipe.transformer.named_parameters())
    is_standard_normal(joined(p for name, p in named if "lora_A" in name) * 4)
    assert not joined(p for name, p in named if "lora_B" in name).any()


def test_the_adapter_depends_on_the_seed(model, work):
    runs = [small_run(model, active=False, seed=seed) for seed in (0, 0, 1)]
    first, again, other = [joined(run.parameters) for run in runs]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_changes_the_adapter_alone(fresh):
    named = fresh.pipe.transformer.state_dict()
    before = dict(zip(named, copied(named.values())))
    flow_grpo.optimize(fresh, flow_grpo.sample(fresh))
    changed = {name for name, p in named.items() if not torch.equal(p, before[name])}
    adapter = {name for name in named if ".lora_" in name}
    assert {name for name in adapter if "blocks.0" in name} <= changed <= adapter


# ---- Averages.
@pytest.mark.parametrize(
    "tags, expected",
    [
        ([None, None, None], 0.5),
        (["position", "position", "position"], 0.5),
        (["counting", "position", "counting"], (0.75 + 0) / 2),
        (["counting", "position", None], (1 + 0 + 0.5) / 3),
    ],
)
def test_averages_are_means_of_the_tags_means(tags, expected):
    columns = {"score": torch.tensor([1.0, 0.0, 0.5])}
    records = [{"prompt": "a", "tag": tag} if tag else {"prompt": "a"} for tag in tags]
    assert flow_grpo.averages(columns, records, "eval_") == {"eval_score": pytest.approx(expected)}
