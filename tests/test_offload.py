"""Weights that are elsewhere between passes: device maps with layers on disk, group offloading to disk, model offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import apply_group_offloading
from families import PROMPTS
from tiny_pipeline import class_pipeline, hushed, seeded, text_pipeline

from arsd.devices import in_use
from arsd.models.target import layer_devices

pytestmark = pytest.mark.filterwarnings("ignore:.*is no size that")


def tokens_of(pipe: Any, **options: Any) -> torch.Tensor:
    call = {"prompt": PROMPTS, "height": 64, "width": 64, "output_type": "pt", "decoder": "sjd:window=6"} | options
    return pipe(**call, generator=seeded(3)).tokens


@pytest.mark.parametrize("kind", ["lumina-mgpt", "anole"])
@pytest.mark.parametrize(
    "on_disk", [["model.layers.1"], ["model.layers.0", "lm_head"], ["model.embed_tokens", "model.norm"]]
)
def test_layers_on_disk_give_the_same_tokens(samples, kind, on_disk, tmp_path):
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    places = {part: "disk" if part in on_disk else "cpu" for part in parts}
    pipe = samples.sample(kind).load(device_map=places, offload_folder=str(tmp_path))
    held = [name for name, p in pipe.transformer.named_parameters() if p.device.type != "meta"]
    assert not any(name.startswith(tuple(on_disk)) for name in held) and held
    assert torch.equal(tokens_of(pipe), tokens_of(samples.pipe(kind)))


def test_a_layers_cache_lives_where_the_layer_computes(samples):
    model = samples.sample("lumina-mgpt").load().transformer.model
    here = torch.device("cpu")
    assert layer_devices(model, here) == [here, here]

    class Elsewhere(ModelHook):
        execution_device = "meta"

    add_hook_to_module(model.layers[1], Elsewhere())
    assert layer_devices(model, here) == [here, torch.device("meta")]


@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_groups_of_layers_on_disk_give_the_same_tokens(samples, how, tmp_path):
    """Between passes the weights are not in memory at all, so whatever is used without being brought is garbage."""
    sample = samples.sample("lumina-mgpt")
    expected, pipe = tokens_of(samples.pipe("lumina-mgpt")), sample.load()
    group = {"num_blocks_per_group": 1} if how == "block_level" else {}
    for part in (pipe.transformer, pipe.vq):
        folder = tmp_path / type(part).__name__
        apply_group_offloading(part, torch.device("cpu"), offload_type=how, offload_to_disk_path=str(folder), **group)
    assert torch.equal(tokens_of(pipe), expected)


@pytest.mark.parametrize("make", [class_pipeline, text_pipeline])
@pytest.mark.parametrize("how", ["leaf_level", "block_level"])
def test_llamagen_in_groups_gives_the_same_tokens(make, how, tmp_path):
    call = {"class_labels": [1, 2]} if make is class_pipeline else {"prompt": ["red apple", "dog face"]}
    call |= {"decoder": "sjd:window=5", "output_type": "pt"}
    pipe = hushed(make())
    expected = pipe(**call, generator=seeded(2))
    group = {"num_blocks_per_group": 1} if how == "block_level" else {}
    for name in ("transformer", "vq"):  # not the T5: diffusers loses tied embeddings on disk
        part = getattr(pipe, name)
        options = {"offload_type": how, "offload_to_disk_path": str(tmp_path / name)}
        apply_group_offloading(part, torch.device("cpu"), **options, **group)
    out = pipe(**call, generator=seeded(2))
    assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.images, expected.images)


def test_whole_models_are_brought_before_any_part_of_them_is_used():
    """Between calls the weights are NaN, and the hook puts them back: what was not asked for would show."""
    pipe = hushed(text_pipeline())
    call: dict[str, Any] = {"prompt": ["red apple"], "decoder": "sjd:window=5", "output_type": "pt"}
    expected = pipe(**call, generator=seeded(2))
    brought = []

    class Bring(ModelHook):
        def __init__(self, module: torch.nn.Module) -> None:
            self.kept = {name: p.detach().clone() for name, p in module.named_parameters()}
            for p in module.parameters():
                p.data.fill_(torch.nan)

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            brought.append(type(module).__name__)
            for name, p in module.named_parameters():
                p.data.copy_(self.kept[name])
            return args, kwargs

    for part in (pipe.transformer, pipe.vq, pipe.text_encoder):
        add_hook_to_module(part, Bring(part))
    out = pipe(**call, generator=seeded(2))
    assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.images, expected.images)
    assert set(brought) == {"T5EncoderModel", "LlamaGenTransformer", "VQTokenizer"}
    assert brought.index("T5EncoderModel") < brought.index("LlamaGenTransformer")  # the order of the offloading chain


def test_a_model_that_another_one_pushed_out_comes_back():
    """As accelerate's chain does it: the tokenizer that decodes a finished picture sends the transformer away."""
    pipe = hushed(class_pipeline())
    call: dict[str, Any] = {"class_labels": [1, 2, 3], "decoder": "sjd", "output_type": "pt", "batch_size": 1}
    expected, finished = pipe(**call, generator=seeded(2)), []
    _, first = cpu_offload_with_hook(pipe.transformer, "cpu")
    _, second = cpu_offload_with_hook(pipe.vq, "cpu", prev_module_hook=first)
    kept = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}

    def away() -> None:
        for p in pipe.transformer.parameters():
            p.data.fill_(torch.nan)

    def back(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, p in module.named_parameters():
            p.data.copy_(kept[name])
        return args, kwargs

    first.offload = away
    pipe.transformer._hf_hook.pre_forward = back
    out = pipe(**call, generator=seeded(2), on_picture=lambda number, one: finished.append(number))
    assert finished == [0, 1, 2]
    assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.images, expected.images)
    second.remove()


def test_hooks_are_let_go_even_when_a_pass_fails():
    module, seen = torch.nn.Linear(2, 2), []

    class Watch(ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append("before")
            return args, kwargs

        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            seen.append("after")
            return output

    add_hook_to_module(module, Watch())
    with pytest.raises(RuntimeError, match="in the middle"), in_use(module, None, "no module"):
        raise RuntimeError("in the middle")
    assert seen == ["before", "after"]


def test_offloading_without_an_accelerator_is_one_clear_error(samples):
    if torch.cuda.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(RuntimeError, match="accelerator"):
        samples.pipe("lumina-mgpt").enable_model_cpu_offload()
