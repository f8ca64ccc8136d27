"""The app as a service, through ``gradio_client`` and MCP: streams, cancels, a full queue, users at once, bad requests."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from app_world import LIMITS, PROMPT, made_service, model_folder, running_app
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from tiny_pipeline import TOKENS, one_clear_line, seeded
from video_llms import clip

from arsd.app.server import serve
from arsd.app.service import TIMED_OUT, Limits
from arsd.errors import InputError
from arsd.provenance import read_png, tokens_sha256

SCHEMA = Path(__file__).parent / "mcp_schema.json"
SJD = "sjd:window=4"

pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("app") / "model") as running:
        yield running


@pytest.fixture(autouse=True)
def no_pause(world):
    yield
    world.pause.seconds = 0.0


@pytest.fixture
def client(world, tmp_path):
    return connect(world, tmp_path / "down")


def connect(world, folder) -> Client:
    return Client(world.url, verbose=False, download_files=str(folder))


def alone(world, decoder=SJD, seed=3) -> str:
    return tokens_sha256(world.service.pipe(PROMPT, decoder=decoder, generator=seeded(seed), progress=False).tokens[0])


def generated(client, seed=3, decoder=SJD, pictures=1):
    """(pictures, report)."""
    return client.predict(PROMPT, decoder, seed, pictures, api_name="/generate")[1:]


# --------------------------------------------------------------------------------------------------------- endpoints


def test_endpoints_are_named_and_the_page_keeps_its_own_to_itself(client):
    known = client.view_api(return_format="dict", print_info=False)
    assert set(known["named_endpoints"]) == {"/list_presets", "/generate", "/compare", "/verify", "/describe"}
    assert not known["unnamed_endpoints"]
    parameters = {p["parameter_name"]: p for p in known["named_endpoints"]["/generate"]["parameters"]}
    assert list(parameters) == ["prompt", "decoder", "seed", "pictures", "guidance_scale", "temperature", "top_k"]
    assert parameters["decoder"]["parameter_default"] == "sjd" and not parameters["prompt"]["parameter_has_default"]


def test_presets_can_be_listed_while_a_run_is_under_way(world, client):
    world.pause.seconds = 0.4
    job = client.submit(PROMPT, "ar", 0, 1, api_name="/generate")
    began = time.perf_counter()
    found = client.predict(api_name="/list_presets")
    assert time.perf_counter() - began < 4.0 and not job.done(), "the run takes 6.4 s"
    assert {one["decoder"] for one in found["presets"]} >= {"sjd", "ar", "std", "cool-sd:budget=2.0"}
    job.result(timeout=20)


def test_generate_streams_how_far_it_is_and_gives_pictures_with_their_records(world, client):
    world.pause.seconds = 0.1
    job = client.submit(PROMPT, "ar", 3, 2, api_name="/generate")
    reports = [report for _, _, report in job]
    assert len(reports) >= 4 and [r["of"] for r in reports[:-1]] == [2 * TOKENS] * (len(reports) - 1)
    done = [r["tokens"] for r in reports[:-1]]
    assert done == sorted(done)
    _, gallery, report = job.result()
    assert [one["tokens_sha256"] for one in report["images"]] == [alone(world, "ar", 3), alone(world, "ar", 4)]
    for item, seed in zip(gallery, (3, 4), strict=True):
        assert read_png(item["image"])["seed"] == seed
        assert client.predict(handle_file(item["image"]), api_name="/verify")["result"] == "verified"


def test_compare_gives_both_pictures_and_a_verdict(world, client):
    plain, fast, report = client.predict(PROMPT, SJD, 3, api_name="/compare")
    assert report["race"]["changed_tokens"] == 0 and report["verdict"].startswith("identical")
    assert [read_png(one)["decoder"] for one in (plain, fast)] == ["ar", SJD]


@pytest.fixture(scope="module")
def gif(tmp_path_factory):
    frames = [Image.fromarray(frame) for frame in clip(4)]
    path = tmp_path_factory.mktemp("clip") / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return str(path)


def test_describe_gives_the_text_of_the_pipeline(world, client, gif):
    text, report = client.predict(handle_file(gif), "What?", "std:budget=8", 4, 20, api_name="/describe")
    own = world.service.video_llm(gif, "What?", num_frames=4, max_new_tokens=20, decoder="ar")
    assert text == report["text"] == own.text and report["stats"]["tokens"] == [20]


# -------------------------------------------------------------------------------------------------- users and limits


def test_three_users_at_once_get_what_each_would_get_alone(world, tmp_path):
    world.pause.seconds = 0.02
    users = [connect(world, tmp_path / str(i)) for i in range(3)]
    asked = [(10, SJD), (20, "ar"), (30, "cool-sd:delta=5")]
    single = [generated(users[0], seed, decoder)[0][0]["image"] for seed, decoder in asked]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda user, one: generated(user, *one), users, asked))
    for (gallery, report), before, (seed, decoder) in zip(found, single, asked, strict=True):
        assert Path(gallery[0]["image"]).read_bytes() == Path(before).read_bytes(), "the same file, to the last bit"
        assert report["images"][0]["tokens_sha256"] == alone(world, decoder, seed)


def test_a_cancelled_job_frees_the_model(world, client, tmp_path):
    world.pause.seconds = 0.3
    job = client.submit(PROMPT, "ar", 3, 6, api_name="/generate")
    while not job.outputs():
        time.sleep(0.02)
    job.cancel()
    world.pause.seconds = 0.0
    began = time.perf_counter()
    generated(connect(world, tmp_path / "other"))
    assert time.perf_counter() - began < 3.0, "16 passes of .3 s were to come"


def test_a_user_who_goes_away_frees_the_model(world, client):
    world.pause.seconds = 0.3
    session = "gone" + str(time.time_ns())
    number = next(i for i, fn in world.page.fns.items() if fn.api_name == "generate")
    data = {"data": [PROMPT, "ar", 3, 6, None, None, None], "fn_index": number, "session_hash": session}
    httpx.post(f"{world.url}gradio_api/queue/join", json=data).raise_for_status()
    with httpx.stream("GET", f"{world.url}gradio_api/queue/data", params={"session_hash": session}, timeout=20) as stream:
        for line in stream.iter_lines():
            if "process_generating" in line:
                break
    began = time.perf_counter()
    world.pause.seconds = 0.0
    generated(client)
    assert time.perf_counter() - began < 3.0


def test_a_full_queue_refuses_in_one_line_and_serves_those_who_wait(world, tmp_path):
    world.pause.seconds = 0.05
    users = [connect(world, tmp_path / str(i)) for i in range(7)]
    jobs = [user.submit(PROMPT, "ar", i, 1, api_name="/generate") for i, user in enumerate(users)]
    served, refused = 0, []
    for i, job in enumerate(jobs):
        try:
            assert job.result(timeout=60)[2]["images"][0]["tokens_sha256"] == alone(world, "ar", i)
            served += 1
        except Exception as error:
            refused.append(str(error))
    assert served >= LIMITS.waiting and refused, (served, refused)
    assert all("queue" in one.lower() and "\n" not in one for one in refused)


def test_a_run_beyond_the_time_limit_is_cut_short_and_says_so(world, client, monkeypatch):
    monkeypatch.setattr(world.service, "limits", Limits(seconds=0.5))
    world.pause.seconds = 0.1
    gallery, report = generated(client, decoder="ar")
    assert gallery == [] and report["stopped"] == TIMED_OUT and 1 <= report["stats"]["tokens"][0] < TOKENS


BAD = [
    ("/generate", ("", SJD, 0, 1), "the prompt is empty"),
    ("/generate", ("x" * 1001, SJD, 0, 1), "at most 1000"),
    ("/generate", (PROMPT, "nope", 0, 1), "unknown decoder"),
    ("/generate", (PROMPT, "sjd:window=<b>", 0, 1), "window must be a whole number >= 1"),
    ("/generate", (PROMPT, SJD, -1, 1), "the seed"),
    ("/generate", (PROMPT, SJD, 0.5, 1), "the seed"),
    ("/generate", (PROMPT, SJD, 0, 0), "the number of pictures"),
    ("/generate", (PROMPT, SJD, 0, 7), "the number of pictures"),
    ("/generate", (PROMPT, SJD, 0, 1, -3), "guidance_scale"),
    ("/generate", (PROMPT, SJD, 0, 1, None, -1), "temperature"),
    ("/generate", (PROMPT, SJD, 0, 1, None, None, -2), "top_k"),
    ("/generate", (PROMPT, SJD, 0, 1, None, None, 10**30), "top_k"),
    ("/generate", (PROMPT, SJD, 10**400, 1), "the seed"),
    ("/generate", (PROMPT, "sjd:window=1000000000", 0, 1), "window may be at most 512"),
    ("/compare", (PROMPT, "std", 0), "decodes text"),
    ("/compare", (" ", SJD, 0), "the prompt is empty"),
    ("/describe", ("clip", "", "ar", 4, 10), "the question is empty"),
    ("/describe", ("clip", "What?", "nope", 4, 10), "unknown decoder"),
    ("/describe", ("clip", "What?", "eagle", 4, 10), "draft model"),
    ("/describe", ("clip", "What?", "ar", 0, 10), "the number of frames"),
    ("/describe", ("clip", "What?", "ar", 4, 65), "the number of tokens"),
    ("/describe", ("text", "What?", "ar", 4, 10), ""),
    ("/verify", ("text",), ""),
    ("/verify", ("broken",), "cannot be read as a picture"),
    ("/verify", ("large",), ""),
    ("/verify", ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},), ""),  # a file of the server's
]


@pytest.mark.parametrize("endpoint, words, says", BAD)
def test_bad_requests_are_one_clear_line(world, client, gif, tmp_path, endpoint, words, says):
    files = {"clip": gif}
    for name, content in (("text.txt", b"words"), ("broken.png", b"words"), ("large.png", b"x" * 300_000)):
        (tmp_path / name).write_bytes(content)
        files[name.partition(".")[0]] = str(tmp_path / name)
    given = [handle_file(files[one]) if isinstance(one, str) and one in files else one for one in words]
    with pytest.raises((AppError, ValueError, httpx.HTTPStatusError)) as caught:
        client.predict(*given, api_name=endpoint)
    assert says in str(caught.value) and len(str(caught.value)) < 400, str(caught.value)
    if says:
        one_clear_line(caught.value, says)


def test_a_run_that_crashes_never_poisons_the_next(world, client, monkeypatch):
    plain = world.service.pipe.decode_pixels
    monkeypatch.setattr(world.service.pipe, "decode_pixels", lambda *a: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(AppError) as caught:
        generated(client)
    one_clear_line(caught.value, "the run failed (RuntimeError)")
    assert "boom" not in str(caught.value), "what is inside stays in the log"
    monkeypatch.setattr(world.service.pipe, "decode_pixels", plain)
    assert generated(client)[1]["images"][0]["tokens_sha256"] == alone(world)


def test_requests_that_go_past_the_queue_are_refused(world):
    data = {"data": [PROMPT, SJD, 3, 1, None, None, None]}
    answer = httpx.post(f"{world.url}gradio_api/run/generate", json=data, timeout=20)
    assert answer.status_code == 404 and "queue" in answer.text


def test_addresses_in_the_place_of_files_are_not_fetched(world, client, monkeypatch):
    fetched = []
    monkeypatch.setattr("gradio.processing_utils.save_url_to_cache", lambda url, *a: fetched.append(url))
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda url, *a: fetched.append(url))
    far = {"path": "https://example.org/a.png", "meta": {"_type": "gradio.FileData"}}
    for endpoint, words in (("/verify", [far]), ("/generate", [far, SJD, 0, 1]), ("/describe", [far, "What?", "ar", 4, 10])):
        with pytest.raises(Exception, match="400|uploaded") as caught:
            client.predict(*words, api_name=endpoint)
        assert "example.org" not in str(caught.value)
    body = {"data": ["x" * 5_000_000]}
    assert httpx.post(f"{world.url}gradio_api/queue/join", json=body, timeout=20).status_code == 413
    assert not fetched and generated(client)[1]["images"]


# ---------------------------------------------------------------------------------------------------------------- MCP


def test_the_mcp_schema_is_the_recorded_one(world):
    """To record it anew: ARSD_RECORD=1."""
    found = httpx.get(f"{world.url}gradio_api/mcp/schema").json()
    if os.environ.get("ARSD_RECORD"):
        SCHEMA.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(SCHEMA.read_text(encoding="utf-8"))
    for tool in found:
        described = [p.get("description") for p in tool["inputSchema"]["properties"].values()]
        assert tool["description"] and all(described), tool["name"]


def test_an_mcp_client_draws_a_picture(world):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def call():
        async with (
            streamable_http_client(f"{world.url}gradio_api/mcp/") as (read, write, *_),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            asked, heard = {"prompt": PROMPT, "decoder": SJD, "seed": 3}, []

            async def hear(*progress):
                heard.append(progress)

            result = await session.call_tool("generate", asked, progress_callback=hear)
            return tools, result, heard

    tools, result, heard = asyncio.run(call())
    assert set(tools) == {"list_presets", "generate", "compare", "verify", "describe"} and not result.isError
    words = " ".join(getattr(part, "text", "") for part in result.content)
    assert alone(world) in words and any(part.type == "image" for part in result.content)
    assert heard, "a client that asks for progress is told of it (and gets the picture itself, not only its address)"


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words, says",
    [
        (("--queue", "0"), "--queue must be at least 1"),
        (("--time-limit", "0"), "--time-limit must be at least 1"),
        (("--upload-limit", "0"), "--upload-limit must be at least"),
        (("--model", "nowhere"), "no model 'nowhere'"),
        (("--video-model", "nowhere"), "no Video-LLM 'nowhere'"),
        (("--card", "nowhere.json"), "cannot read nowhere.json"),
        (("--port", "70000"), "--port must lie in 1..65535"),
        (("--port", "taken"), "cannot listen on 127.0.0.1"),
        (("--host", "203.0.113.1"), "cannot listen on 203.0.113.1"),
        (("--dtype", "float8"), "unknown dtype"),
        (("--model", "none"), "nothing to show without a model"),
        (("--model", "emoji-video-chat"), "emoji-video-chat"),
    ],
)
def test_mistakes_in_the_command_are_one_line(world, command, tmp_path, words, says):
    folder = world.service.model
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = [str(other.getsockname()[1]) if word == "taken" else word for word in words]
        given = ["--model", folder, "--video-model", "none", "--device", "cpu", "--dtype", "float32", *words]
        status, out, err = command("app", *given)
    assert (status, len(err)) == (2, 1) and says in err[0], err


def test_without_gradio_the_command_says_what_to_install(command, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "arsd.app.server")
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, _, err = command("app")
    assert status == 2 and err == ["arsd: the app needs gradio: pip install 'arsd[app]'"]


def test_the_files_of_users_are_gone_when_the_server_is(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    before = os.environ.get("GRADIO_TEMP_DIR")
    service = made_service(model_folder(tmp_path.parent / f"{tmp_path.name}-model"))
    with serve(service) as served:
        user = Client(served.url, verbose=False, download_files=False)
        user.predict(PROMPT, SJD, 1, 1, api_name="/generate")
        assert list(tmp_path.rglob("*.png")), "what is served lies in the server's own folder"
    assert list(tmp_path.iterdir()) == [] and os.environ.get("GRADIO_TEMP_DIR") == before
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_an_mcp_server_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    import sys

    service = made_service(model_folder(tmp_path / "model"))
    monkeypatch.setitem(sys.modules, "gradio.mcp", None)
    with pytest.raises(InputError) as caught, serve(service, mcp=True):
        pass
    one_clear_line(caught.value, "pip install 'arsd[app]'")
    assert torch.get_num_threads() >= 1
