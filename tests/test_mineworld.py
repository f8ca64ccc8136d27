"""MineWorld: actions stand between frames, each clip's own, and every strategy gives the clips of plain AR decoding."""

from __future__ import annotations

import json
from typing import Any

import pytest
import reference_mineworld as reference
import torch
from published_files import State
from tiny_pipeline import one_clear_line, seeded
from torch import Tensor

from arsd import EagleDrafter
from arsd.clip_files import save_webp
from arsd.errors import ArsdError, InputError
from arsd.models.mineworld import BUTTONS, ActionVolume, MineWorldTransformer, encode_action, parse_actions
from arsd.pipelines.mineworld import MineWorldPipeline
from arsd.pipelines.outputs import Conditions
from arsd.tokenizers.amused import AmusedTokenizer

FRAMES, (ROWS, COLUMNS), CODES, LENGTH = reference.FRAMES, reference.GRID, reference.CODES, reference.LENGTH
PIXELS, FRAME = ROWS * COLUMNS, ROWS * COLUMNS + LENGTH
TOKENS, CLIPS = FRAMES * FRAME - LENGTH, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mineworld")
    reference.write_mineworld(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    """In float64, where equality is promised without conditions."""
    made = MineWorldPipeline.from_pretrained(folder / "5M_4f.ckpt", dtype=torch.float64, **reference.OPTIONS)
    made.set_progress_bar_config(disable=True)
    return made


def first_frames(count: int = CLIPS, frames: int = 1) -> Tensor:
    return torch.randint(CODES, (count, frames, ROWS, COLUMNS), generator=seeded(1))


def actions_of(count: int = CLIPS) -> Tensor:
    """[M, frames - 1, 11] ids, other ones in every clip."""
    return torch.randint(CODES, reference.VOCAB, (count, FRAMES - 1, LENGTH), generator=seeded(2))


def clips(pipe: Any, decoder: Any = "ar", count: int = CLIPS, **options: Any) -> Any:
    options = {"frames": first_frames(count), "actions": actions_of(count), "output_type": "latent"} | options
    sources = [seeded(i) for i in range(count)]
    return pipe(decoder=decoder, generator=options.pop("generator", sources), **options)


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(left[k].dtype == right[k].dtype and left[k].equal(right[k]) for k in left)


# ----------------------------------------------------------------------------------------------------------------- actions

NULL, FIRST, LAST = 8258, 8257, 8259
IDLE = [FIRST, 8225, 8246, *[NULL] * 7, LAST]


@pytest.mark.parametrize(
    ("action", "ids"),
    [  # as Microsoft's MCDataset.get_action_index_from_actiondict has them
        ({}, IDLE),
        ({"forward": 1}, [*IDLE[:4], 8194, *IDLE[5:]]),
        ({"back": 1, "left": 1}, [*IDLE[:4], 8195, 8196, *IDLE[6:]]),
        ({"right": 1, "sprint": 1, "jump": 1}, [*IDLE[:5], 8197, 8200, NULL, 8198, NULL, LAST]),
        ({"sneak": 1, "use": 1, "pickItem": 1}, [*IDLE[:6], 8199, 8192, NULL, 8203, LAST]),
        ({"attack": 1, "drop": 1}, [*IDLE[:7], 8193, NULL, 8201, LAST]),
        ({"hotbar.3": 1, "hotbar.7": 1}, [*IDLE[:3], 8208, *IDLE[4:]]),
        ({"forward": 1, "back": 1, "use": 1, "attack": 1, "left": 0}, IDLE),
        ({"swapHands": 1, "inventory": 1, "ESC": 1}, IDLE),
        ({"camera": [0, 90]}, [FIRST, 8225, 8256, *IDLE[3:]]),
        ({"camera": (-500, 5)}, [FIRST, 8215, 8248, *IDLE[3:]]),
        ({"camera": torch.tensor([2.0, -45.0])}, [FIRST, 8226, 8238, *IDLE[3:]]),
    ],
)
def test_ids_of_actions_are_microsofts(action, ids):
    assert encode_action(action, 8192) == ids


def test_the_bins_of_the_camera_are_symmetric_and_grow(pipe):
    found = [encode_action({"camera": [angle, -angle]}, 0)[1:3] for angle in range(-90, 91)]
    down, right = ([row[i] for row in found] for i in (0, 1))
    assert down == sorted(down) and len(set(down)) == 21 and (min(down), max(down)) == (23, 43)
    assert [n - 44 for n in right] == [43 - n for n in down]
    assert down.count(33) == 3 and down.count(23) == down.count(43) == 12


def test_actions_come_as_mappings_ids_or_one_for_all_the_time():
    one = encode_action({"jump": 1}, CODES)
    expected = torch.tensor([[one, IDS := encode_action({}, CODES), one]])
    mappings: list[Any] = [{"jump": 1}, {}, {"jump": 1}]
    for given in (
        mappings,
        [one, IDS, {"jump": 1}],
        [mappings],
        expected,
        expected[0].numpy(),
        expected[0].int(),
        [one, {}, one, {}],
    ):
        assert torch.equal(parse_actions(given, FRAMES, CODES), expected)
    assert torch.equal(parse_actions({"jump": 1}, FRAMES, CODES), torch.tensor([[one] * 3]))
    both = parse_actions([mappings, [{}] * 3], FRAMES, CODES)
    assert both.shape == (2, 3, LENGTH) and torch.equal(both[:1], expected)
    assert torch.equal(
        parse_actions(torch.cat([expected[0], torch.tensor([IDS])]), FRAMES, CODES), expected
    )  # the last is not read


@pytest.mark.parametrize(
    ("actions", "says"),
    [
        ({"fly": 1}, "an action has no 'fly': it can have camera, use, attack"),
        ({"jump": 2}, "jump of an action must be 0 or 1, not 2"),
        ({"jump": "yes"}, "jump of an action must be 0 or 1"),
        ({"camera": [1]}, "camera of an action must be two angles in degrees"),
        ({"camera": 3}, "camera of an action must be two angles"),
        ({"camera": [0, float("nan")]}, "camera of an action must be two angles"),
        ([{}, {}], "4 frames take 3 actions, one behind each but the last, not 2"),
        ([[{}] * 3, [{}] * 4], "as many of each clip"),
        (["jump"] * 3, "actions must be mappings, or ids"),
        ("jump", "actions must be mappings, or ids"),
        ([], "ids of actions must be whole numbers"),
        (torch.zeros(3, 10).long(), "whole numbers [frames, 11], not (1, 3, 10)"),
        (torch.full((3, 11), 33.0), "ids of actions must be whole numbers"),
        (torch.zeros(3, 11).long(), "ids of actions must lie in 32..101"),
        (torch.full((3, 11), 102), "ids of actions must lie in 32..101"),
    ],
)
def test_what_are_no_actions_is_one_clear_line(pipe, actions, says):
    with pytest.raises(InputError) as error:
        clips(pipe, count=1, actions=actions)
    one_clear_line(error.value, says)


# -------------------------------------------------------------------------------------------------------------- the layout


@pytest.mark.parametrize("size", [(FRAMES, ROWS, COLUMNS), (16, 14, 24), (2, 1, 1)])
def test_the_layout_is_frame_action_frame(size):
    frames, rows, columns = size
    actions = torch.randint(32, 102, (2, frames - 1, LENGTH), generator=seeded(1))
    volume, codes = ActionVolume(*size, 32, actions), torch.randint(32, (2, *size), generator=seeded(2))
    expected = []
    for clip in range(2):
        row: list[int] = []
        for t in range(frames):
            row += codes[clip, t].flatten().tolist() + (actions[clip, t].tolist() if t < frames - 1 else [])
        expected.append(row)
    tokens = torch.tensor(expected)
    assert volume.num_tokens == len(expected[0]) and volume.vocab == 102 and volume.frame_length == rows * columns + 11
    assert torch.equal(volume.to_codes(tokens), codes)
    assert torch.equal(volume.from_codes(codes[:, : frames - 1]), tokens[:, : -rows * columns])
    grammar, positions = volume.grammar(), torch.arange(volume.num_tokens).expand(2, -1)
    forced = grammar.forced_at(positions)
    assert torch.equal(torch.where(forced >= 0, forced, tokens), tokens) and int((forced >= 0).sum()) == actions.numel()
    assert torch.equal(grammar.num_choices(positions), torch.full_like(positions, 32))
    assert volume.begins(volume.frame_length) == (frames > 1) and not volume.begins(volume.num_tokens)
    assert not volume.begins(rows * columns)


def test_without_actions_nothing_is_done():
    volume = ActionVolume(3, 1, 2, CODES)
    idle = encode_action({}, CODES)
    tokens = volume.from_codes(torch.tensor([[[[1, 2]]], [[[3, 4]]]]))
    assert tokens.tolist() == [[1, 2, *idle], [3, 4, *idle]]
    grammar = volume.grammar()
    assert grammar.forced_at(torch.arange(28)).tolist() == [-1, -1, *idle, -1, -1, *idle, -1, -1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda v: v.to_codes(torch.zeros(1, 5).long()), "tokens must be [B, 57]"),
        (lambda v: v.to_codes(torch.full((1, TOKENS), CODES)), "tokens have actions at the places of codes"),
        (lambda v: v.from_codes(torch.zeros(1, 2, 3).long()), "codes must be [B, 1..4, 2, 3]"),
        (lambda v: v.from_codes(torch.zeros(1, 4, 2, 3).long()), "cannot begin with 1 x 4"),
        (lambda v: v.from_codes(torch.zeros(3, 1, 2, 3).long()), "2 x 4 frames cannot begin with 3 x 1"),
        (lambda v: v.forced, "2 clips have actions of their own: ask for one of them"),
    ],
)
def test_what_does_not_fit_the_layout_is_one_clear_line(call, says):
    with pytest.raises(InputError) as error:
        call(ActionVolume(FRAMES, ROWS, COLUMNS, CODES, actions_of(2)))
    one_clear_line(error.value, says)


# ------------------------------------------------------------------------------------------------------------ the pipeline

STRATEGIES = [
    *("sjd:window=2", "sjd:window=7,init=left", "sjd:window=16,init=above", "sjd:window=33,init=previous-frame"),
    *("sjd:window=64", "frame-copy", "prompt-lookup", "token-recycling"),
]


@pytest.fixture(scope="module")
def plain(pipe):
    """[M, N] plain AR, clip by clip."""
    return torch.cat(
        [
            clips(pipe, "ar", 1, frames=first_frames()[i : i + 1], actions=actions_of()[i], generator=[seeded(i)]).tokens
            for i in range(CLIPS)
        ]
    )


def test_what_is_given_stands_where_it_belongs(pipe, plain):
    volume = pipe.make_raster()
    assert torch.equal(volume.to_codes(plain)[:, :1], first_frames())
    between = [plain[:, t * FRAME + PIXELS : (t + 1) * FRAME] for t in range(FRAMES - 1)]
    assert torch.equal(torch.stack(between, 1), actions_of())
    assert len({tuple(row.tolist()) for row in volume.to_codes(plain)[:, 1:].flatten(1)}) == CLIPS


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_every_strategy_gives_plain_ars_clips_in_a_queue_of_clips_with_actions_of_their_own(
    pipe, plain, strategy, batch_size
):
    out = clips(pipe, strategy, batch_size=batch_size)
    assert torch.equal(out.tokens, plain)
    assert out.stats.tokens == [TOKENS - FRAME] * CLIPS and out.stats.forward_passes < (TOKENS - FRAME) * CLIPS
    assert strategy in ("prompt-lookup", "token-recycling") or out.stats.row_passes[0] < TOKENS - FRAME - LENGTH


def test_strategies_mix_in_one_batch(pipe, plain):
    assert torch.equal(clips(pipe, ["ar", *STRATEGIES[:4]], batch_size=3).tokens, plain)


def test_frames_that_are_given_are_read_and_not_made(pipe):
    given = first_frames(2, 3)
    out = clips(pipe, "sjd:window=8", 2, frames=given)
    assert torch.equal(out.frames[:, :3], given) and out.stats.tokens == [PIXELS] * 2
    assert torch.equal(out.tokens, clips(pipe, "ar", 2, frames=given).tokens)
    assert out.inputs[0] == {"actions": actions_of()[0].tolist(), "given_tokens": 3 * FRAME}
    assert json.loads(json.dumps(out.inputs[1]))["actions"] == actions_of()[1].tolist()


def test_other_actions_make_other_clips_from_the_same_noise(pipe):
    same_noise: dict[str, Any] = {"frames": first_frames()[:1], "generator": [seeded(0)]}
    found = {
        tuple(clips(pipe, "sjd:window=8", 1, actions=action, **same_noise).frames.flatten().tolist())
        for action in ({}, {"forward": 1}, {"camera": [0, 30]})
    }
    assert len(found) == 3


def test_one_for_all_or_one_for_each(pipe):
    frames, actions = first_frames(2), actions_of(2)
    both = clips(pipe, "ar", 2, actions=actions[0])
    assert torch.equal(both.tokens[:, PIXELS:FRAME], actions[:1, 0].expand(2, -1))
    assert torch.equal(clips(pipe, "ar", 2, frames=frames[:1]).frames[:, 0], frames[:1, 0].expand(2, -1, -1))
    each = clips(pipe, "ar", 4, frames=frames, actions=actions, num_videos_per_prompt=2)
    assert torch.equal(each.frames[:, 0], frames[:, 0].repeat_interleave(2, 0))
    assert torch.equal(each.tokens[:, PIXELS:FRAME], actions[:, 0].repeat_interleave(2, 0))
    with pytest.raises(InputError) as error:
        clips(pipe, "ar", 3, actions=actions_of(2))
    one_clear_line(error.value, "got actions of 2 clips for frames of 3: give one, or one for each")


def test_clips_may_be_shorter_than_those_the_model_knows(pipe, plain):
    out = clips(pipe, "sjd:window=8", num_frames=3, actions=actions_of()[:, :2])
    assert torch.equal(out.tokens, plain[:, : 2 * FRAME + PIXELS]) and out.inputs[0]["num_frames"] == 3
    assert torch.equal(
        clips(pipe, "ar", num_frames=3, actions=actions_of()).tokens, out.tokens
    )  # as many as there are frames


@pytest.mark.parametrize("kind", ["pil", "np", "pt"])
def test_pictures_go_in_and_clips_come_out(pipe, kind):
    image = torch.rand(2, 1, 3, 32, 48, generator=seeded(5))
    out = clips(pipe, "sjd:window=8", 2, frames=image, output_type=kind)
    codes = pipe.vq.encode(image[:, 0].double() * 2 - 1)
    assert torch.equal(pipe.make_raster().to_codes(out.tokens)[:, 0], codes)
    if kind == "pil":
        assert [len(clip) for clip in out.frames] == [FRAMES] * 2 and out.frames[1][3].size == (48, 32)
    else:
        assert out.frames.shape == ((2, FRAMES, 3, 32, 48) if kind == "pt" else (2, FRAMES, 32, 48, 3))


def test_drafters_draft(pipe, plain):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = {**pipe.transformer.config, "num_layers": 1}
        small = MineWorldTransformer.from_config(config).double().eval()
        eagle = EagleDrafter.for_transformer(pipe.transformer.lm).double()
    for drafter, strategy in (
        (small, "speculative:drafter=draft-model,window=4"),
        (eagle, "eagle:tree=2x1"),
        (eagle, "hybrid"),
    ):
        other = MineWorldPipeline(pipe.transformer, pipe.vq, drafter=drafter)
        other.set_progress_bar_config(disable=True)
        assert torch.equal(clips(other, strategy, batch_size=2).tokens, plain)
    other = MineWorldPipeline(pipe.transformer, pipe.vq, drafter=pipe.transformer)  # which is always right
    out = clips(other, "speculative:drafter=draft-model,window=5", progress=False)
    assert torch.equal(out.tokens, plain) and out.stats.forward_passes == -(-(TOKENS - FRAME) // 5)


@pytest.mark.parametrize(
    "strategy", ["cool-sd:delta=2", "lantern:k=3,delta=0.3", "grouped:radius=9", "sjd:coupling=maximal"]
)
def test_rules_that_draw_otherwise_keep_the_actions(pipe, strategy):
    other = MineWorldPipeline(pipe.transformer, pipe.vq, drafter=pipe.transformer)
    assert other.codebook.shape == (reference.VOCAB, 8) and torch.equal(other.codebook[:CODES], pipe.vq.codebook)
    out = clips(other, strategy, batch_size=2, progress=False)
    between = [out.tokens[:, t * FRAME + PIXELS : (t + 1) * FRAME] for t in range(FRAMES - 1)]
    assert torch.equal(torch.stack(between, 1), actions_of()) and int(out.frames.max()) < CODES


def test_conditions_follow_from_the_record(pipe):
    out = clips(pipe, "ar", 2, frames=first_frames(2, 2))
    made: Conditions = pipe.conditions_of(out.inputs, False)
    assert torch.equal(made.raster.actions, actions_of(2)) and made.given is None
    record = json.loads(json.dumps(pipe.record(out, 1)))
    assert record["actions"] == actions_of(2)[1].tolist() and record["given_tokens"] == 2 * FRAME
    forced = pipe.raster_of(record).forced
    assert len(forced) == (FRAMES - 1) * LENGTH and all(out.tokens[1, n] == token for n, token in forced.items())
    for damaged in ({}, {"actions": "jump"}, {"actions": [[1]]}, {"actions": {"fly": 1}}):
        with pytest.raises(InputError):
            pipe.raster_of(damaged)


@pytest.mark.parametrize("decoder", ["ar", "sjd:window=8"])
def test_clips_carry_their_proof(pipe, tmp_path, decoder):
    """A clip of a batch is followed by its record; with another action in the record, or another token, it is refuted."""
    out = clips(pipe, decoder, 3, frames=first_frames(3, 2), output_type="pil")
    for i in range(3):
        record = pipe.record(out, i)
        save_webp(out.frames[i], tmp_path / f"{i}.webp", record)
        found = pipe.verify(tmp_path / f"{i}.webp")
        assert (found.result, found.mismatches, found.pixels_match) == ("verified", 0, True), found.reason
        other = record["actions"][:2] + [encode_action({"jump": 1}, CODES)]
        for name, change in (
            ("a", {"actions": other}),
            ("b", {"noise_seed": 1 + record["noise_seed"]}),
            ("c", {"actions": 3}),
            ("c", {"actions": [{"camera": [10**400, 0]}] * (FRAMES - 1)}),
            ("c", {"actions": json.loads("[" * 500 + "]" * 500)}),
        ):
            save_webp(out.frames[i], tmp_path / f"{name}{i}.webp", record | change, overwrite=True)
            assert pipe.verify(tmp_path / f"{name}{i}.webp").result == ("unknown" if name == "c" else "refuted")


def test_published_defaults():
    raster = ActionVolume(16, 14, 24, 8192)
    assert (raster.num_tokens, raster.frame_length, raster.vocab, len(raster.marks)) == (15 * 347 + 336, 347, 8262, 70)
    assert len(BUTTONS) == 23
    with torch.device("meta"):
        assert AmusedTokenizer().downsample_factor == 16


def test_greedy_clips_are_those_of_frames_and_actions_fed_in_turn(pipe):
    """Token by token with the independent forward: a frame, its action, the best code behind it, and so on."""
    state = {key: value.double() for key, value in reference.llama_state().items()}
    for clip in range(2):
        ids = first_frames()[clip].flatten().tolist()
        for action in actions_of()[clip].tolist():
            ids += action
            for _ in range(PIXELS):
                ids.append(int(reference.logits(state, torch.tensor(ids))[-1, :CODES].argmax()))
        for decoder in ("ar", "sjd:window=9"):
            one = {"frames": first_frames()[clip : clip + 1], "actions": actions_of()[clip]}
            out = clips(pipe, decoder, 1, temperature=0, **one)
            assert out.tokens[0].tolist() == ids
            assert out.frames.shape == (1, FRAMES, ROWS, COLUMNS) and len(out.frames[0, 1:].unique()) > 3


def test_a_pipeline_is_saved_and_loaded_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = MineWorldPipeline.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(clips(again, "sjd:window=5", 2).tokens, clips(pipe, "ar", 2).tokens)
    assert json.loads((tmp_path / "model_index.json").read_text())["vq"] == ["arsd.tokenizers.amused", "AmusedTokenizer"]
    pipe.vq.save_pretrained(tmp_path / "other")
    assert same(
        MineWorldPipeline.from_pretrained(tmp_path, vq=tmp_path / "other").vq.state_dict(), again.vq.float().state_dict()
    )


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"frames": None}, "this model goes on from frames: give some"),
        ({"actions": None}, "this model wants actions: give one for each frame but the last, or {} to do nothing"),
        ({"prompt": "a cow"}, "this model knows no prompt: give frames and actions"),
        ({"class_labels": 3}, "this model knows no class_labels"),
        ({"guidance_scale": 2.0}, "leave out guidance_scale"),
        ({"height": 64}, "48 x 32 pixels only"),
        ({"num_frames": 5}, "clips of 2 to 4 frames, not 5"),
        ({"num_frames": 1}, "clips of 2 to 4 frames, not 1"),
        ({"num_frames": 3.0}, "clips of 2 to 4 frames"),
        ({"num_videos_per_prompt": 0}, "at least 1, not 0"),
        ({"frames": first_frames(1, 4)}, "frames holds codes of shape (1, 4, 2, 3)"),
        ({"frames": first_frames(1) + CODES}, "frames holds codes outside 0..31"),
        ({"frames": "a.mp4"}, "frames must be pictures, an array or a tensor"),
    ],
)
def test_bad_inputs_are_answered_in_one_line(pipe, call, says):
    with pytest.raises(ArsdError) as error:
        clips(pipe, count=1, **call)
    one_clear_line(error.value, says)
