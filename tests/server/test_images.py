"""Images in requests: what reaches the engine from each wire format, what is refused, and a model that takes them."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from engine import CheckpointError, EngineOptions, GenerationRequest, build_engine
from server.app import AppSettings, create_app
from server.bridge import Bridge
from server.chat import ChatService
from server.errors import ApiError
from server.images import MAX_IMAGES, ImageReader, image_part
from server.launch import chat_service
from server.prompt import PromptRenderer
from tests.engine.small_models import small_config
from tests.engine.vision_models import TOWER, random_vision_model, save_vision
from tests.fakes import CONTROL, TEMPLATE, FakeEngine, Template, byte_tokenizer, script
from tests.server.conftest import NAMES, Client

OPEN, SOFT, CLOSE = (CONTROL[name] for name in ("<|image>", "<|image|>", "<image|>"))
# as Google's templates show a message of parts
PARTS = """
{%- macro shown(c) -%}{%- if c is string -%}{{ c | trim }}{%- else -%}
{%- for p in c -%}{{ '<|image|>' if p.type == 'image' else p.text | trim }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
"""
WITH_IMAGES = PARTS + TEMPLATE.replace("m.content | trim", "shown(m.content)").replace(
    "value(m.content)", "value(shown(m.content))"
)
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def file(width: int = 60, height: int = 40, kind: str = "PNG", seed: int = 0, **options: Any) -> str:
    """The base64 text of an image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def url(data: str) -> str:
    return f"data:image/png;base64,{data}"


def header_only(width: int, height: int) -> str:
    """A PNG that says how large it is and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    crc = struct.pack(">I", zlib.crc32(head))
    return base64.b64encode(b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + crc + b"\0\0\0\x08IDAT").decode()


def processor() -> Gemma4ImageProcessorPil:
    return Gemma4ImageProcessorPil(patch_size=2, max_soft_tokens=70, pooling_kernel_size=3)


@pytest.fixture
def client() -> Iterator[Client]:
    engine = FakeEngine([script("A picture.")], image_tokens=70)
    prompts = PromptRenderer(byte_tokenizer(), Template(WITH_IMAGES))
    with Bridge(engine) as bridge:
        service = ChatService(bridge, prompts, NAMES, ImageReader(processor()))
        yield Client(engine, create_app(service, AppSettings()))


def chat_body(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": role, "content": list(parts)}, {"role": "user", "content": "?"}]}


def of_chat(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data, "detail": "high"}}


def of_responses(data: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": data, "detail": "auto"}


def of_messages(data: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


TEXT = {"type": "text", "text": "before"}
BODIES: dict[str, tuple[str, Callable[[str], dict[str, Any]]]] = {
    "chat": (CHAT, lambda data: chat_body(TEXT, of_chat(url(data)), {"type": "text", "text": "behind"})),
    "chat, address alone": (
        CHAT,
        lambda data: chat_body(TEXT, {"type": "image_url", "image_url": url(data)}, {"type": "text", "text": "behind"}),
    ),
    "responses": (
        RESPONSES,
        lambda data: {
            "model": "demo",
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "before"},
                        of_responses(url(data)),
                        {"type": "input_text", "text": "behind"},
                    ],
                },
                {"role": "user", "content": "?"},
            ],
        },
    ),
    "messages": (
        MESSAGES,
        lambda data: {
            "max_tokens": 20,
            **chat_body(TEXT, of_messages(data), {"type": "text", "text": "behind"}),
        },
    ),
}


def placed(request: GenerationRequest) -> list[tuple[int, int]]:
    """Where images stand, after a look at what stands around them."""
    for image in request.images:
        around = request.prompt_ids[image.at - 1 : image.at + image.tokens + 1]
        assert around == (OPEN, *[SOFT] * image.tokens, CLOSE)
    assert request.prompt_ids.count(SOFT) == sum(image.tokens for image in request.images)
    return [(image.at, image.tokens) for image in request.images]


@pytest.mark.parametrize(("path", "body"), BODIES.values(), ids=BODIES.keys())
def test_an_image_reaches_the_engine(client: Client, path: str, body: Callable[[str], dict[str, Any]]) -> None:
    answer = client.request("POST", path, json=body(file()))
    assert answer.status_code == 200, answer.text
    (request,) = client.engine.requests
    ((at, tokens),) = placed(request)
    text = byte_tokenizer().decode(request.prompt_ids[:at], skip_special_tokens=False)
    assert text == "<bos><|turn>user\nbefore<|image>"
    behind = byte_tokenizer().decode(request.prompt_ids[at + tokens :], skip_special_tokens=False)
    assert behind.startswith("<image|>behind<turn|>\n<|turn>user\n?")
    usage = answer.json()["usage"]
    assert usage.get("prompt_tokens", usage.get("input_tokens")) == len(request.prompt_ids)
    image = request.images[0]
    assert (image.columns, image.rows, image.tokens) == (30, 18, 60), "the shape of the file, in 630 patches at most"
    expected = processor()(images=[Image.open(io.BytesIO(base64.b64decode(file())))], return_tensors=None)
    pixels = np.frombuffer(image.pixels, dtype=np.float32).reshape(540, 12)
    assert np.array_equal(pixels, expected["pixel_values"][0][:540].astype(np.float32))


def test_several_images_keep_their_order(client: Client) -> None:
    body = chat_body(of_chat(url(file(seed=1))), of_chat(url(file(seed=2))), TEXT, of_chat(url(file(seed=1))))
    assert client.request("POST", CHAT, json=body).status_code == 200
    first, second, third = client.engine.requests[0].images
    assert len(placed(client.engine.requests[0])) == 3
    assert first.number == third.number != second.number


def test_a_tool_may_show_an_image(client: Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c", "content": [TEXT, of_chat(url(file()))]}
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    assert client.request("POST", CHAT, json={"messages": history}).status_code == 200
    use = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
    shown = {"type": "tool_result", "tool_use_id": "c", "content": [TEXT, of_messages(file())]}
    turns = [("user", "?"), ("assistant", [use]), ("user", [shown])]
    body = {"max_tokens": 20, "messages": [{"role": role, "content": content} for role, content in turns]}
    assert client.request("POST", MESSAGES, json=body).status_code == 200
    assert [len(placed(request)) for request in client.engine.requests] == [1, 1]
    assert client.engine.requests[0].prompt_ids == client.engine.requests[1].prompt_ids


def test_a_response_that_goes_on_has_the_earlier_images(client: Client) -> None:
    first = client.request("POST", RESPONSES, json=BODIES["responses"][1](file())).json()
    again = {"model": "demo", "input": "And now?", "previous_response_id": first["id"]}
    assert client.request("POST", RESPONSES, json=again).status_code == 200
    one, two = client.engine.requests
    assert placed(one) == placed(two) and one.images[0].number == two.images[0].number


def test_counting_and_templates_know_images(client: Client) -> None:
    body = BODIES["messages"][1](file())
    counted = client.request("POST", "/v1/messages/count_tokens", json=body).json()["input_tokens"]
    tokenized = client.request("POST", "/tokenize", json=BODIES["chat"][1](file())).json()
    client.request("POST", MESSAGES, json=body)
    assert counted == tokenized["count"] == len(client.engine.requests[0].prompt_ids)
    shown = client.request("POST", "/apply-template", json=BODIES["chat"][1](file())).json()["prompt"]
    assert "before<|image|>behind" in shown


REFUSED: dict[str, tuple[str, str]] = {
    "an address": ("https://example.com/cat.png", "not fetched from https: addresses"),
    "a file of this machine": ("file:///etc/passwd", "not fetched from file: addresses"),
    "no base64": ("data:image/png;base64,%%%", "not base64"),
    "another encoding": ("data:image/png,abc", "not fetched from data: addresses"),
    "no image": (url(base64.b64encode(b"hello").decode()), "none of PNG"),
    "another format": (url(file(kind="BMP")), "none of PNG"),
    "cut off": (url(file()[:400]), "cannot be read"),
    "a bomb": (url(header_only(60_000, 60_000)), "cannot be read"),
    "too large": (url(header_only(8_000, 7_000)), "at most 50 million"),
    "too long": (url(file(width=603, height=3)), "at most 200 times"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(client: Client, data: str, message: str) -> None:
    answer = client.request("POST", CHAT, json=chat_body(TEXT, of_chat(data)))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "messages[0].content[1]")
    assert message in error["message"]
    assert not client.engine.requests


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_are_read_or_refused(kind: str) -> None:
    """Bytes changed, cut out and put in, half of them in the header."""
    whole, chance, reader = base64.b64decode(file(30, 20, kind)), random.Random(kind), ImageReader(processor())
    ends = {True: 0, False: 0}
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3])):
            place = chance.randrange(min(chance.choice([60, len(damaged)]), len(damaged)))
            damaged[place : place + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        part = image_part(base64.b64encode(damaged).decode(), "here")
        try:
            ends[bool(reader.read([{"role": "user", "content": [part]}], 1000))] += 1
        except ApiError as error:
            assert (error.status, error.param) == (400, "here")
            ends[False] += 1
    assert ends[True] and ends[False]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_whose_images_are_read(client: Client, role: str) -> None:
    answer = client.request("POST", CHAT, json=chat_body(TEXT, of_chat(url(file())), role=role))
    assert answer.status_code == 400
    assert "messages of the user" in answer.json()["error"]["message"]


def test_there_may_not_be_too_many(client: Client) -> None:
    tiny = of_chat(url(file(9, 9)))
    answer = client.request("POST", CHAT, json=chat_body(*[tiny] * (MAX_IMAGES + 1)))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"messages[0].content[{MAX_IMAGES}]")
    answer = client.request("POST", CHAT, json=chat_body(*[of_chat(url(header_only(7_000, 7_000)))] * 5))
    assert answer.status_code == 400


def test_images_beyond_the_context_are_too_long(client: Client) -> None:
    """Said before all of them are cut up."""
    answer = client.request("POST", CHAT, json=chat_body(*[of_chat(url(file(100, 70)))] * MAX_IMAGES))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("name", BODIES)
def test_a_model_of_text_refuses_them(serve: Callable[..., Client], name: str) -> None:
    path, body = BODIES[name]
    client = serve(script("x"))
    answer = client.request("POST", path, json=body(file()))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert "This model reads text only" in error["message"]
    if path != MESSAGES:
        assert error["code"] == "unsupported_value"
        assert error["param"] == ("input[0].content[1]" if path == RESPONSES else "messages[0].content[1]")
    assert not client.engine.requests


def test_models_say_what_they_take(client: Client, serve: Callable[..., Client]) -> None:
    for each, expected in ((client, ["text", "image"]), (serve(script("x")), ["text"])):
        (card, *_) = each.request("GET", "/v1/models").json()["data"]
        assert card["input_modalities"] == expected


def test_a_photo_is_turned_as_its_camera_says(client: Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    client.request("POST", CHAT, json=chat_body(of_chat(url(file(kind="JPEG", exif=exif)))))
    image = client.engine.requests[0].images[0]
    assert (image.columns, image.rows) == (18, 30)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB"), ("JPEG", "CMYK")]
)
def test_formats_and_modes(client: Client, kind: str, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 30, 30)).convert(mode).save(buffer, kind)
    answer = client.request("POST", CHAT, json=chat_body(of_chat(url(base64.b64encode(buffer.getvalue()).decode()))))
    assert answer.status_code == 200, answer.text
    pixels = np.frombuffer(client.engine.requests[0].images[0].pixels, dtype=np.float32).reshape(-1, 3)
    assert np.abs(pixels.mean(0) * 255 - (200, 30, 30)).max() < 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that takes images, with a tokenizer, a template and an image processor."""
    config = small_config(("sliding", "full"), vocab_size=512, sliding_window=80, max_position_embeddings=1024)
    config.image_token_id = SOFT
    model = random_vision_model(config, tower=TOWER | {"position_embedding_size": 256})
    folder = save_vision(model, tmp_path_factory.mktemp("vision"))
    settings = json.loads(processor().to_json_string())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=WITH_IMAGES)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_whole_model_sees_the_image(checkpoint: Path) -> None:
    options = EngineOptions(model=str(checkpoint), device="cpu", progress=False, context_length=512, slots=1)
    with Bridge(build_engine(options)) as bridge:
        client = Client(FakeEngine([]), create_app(chat_service(bridge, NAMES), AppSettings()))
        assert bridge.info.image_tokens == 70

        def ask(seed: int) -> tuple[str, int]:
            body = chat_body(TEXT, of_chat(url(file(seed=seed)))) | {"max_tokens": 8, "temperature": 0}
            body["easel"] = {"confidence_threshold": 1000, "stability_threshold": 0}  # it will never be sure
            answer = client.request("POST", CHAT, json=body)
            assert answer.status_code == 200, answer.text
            used = answer.json()["usage"]
            assert used["prompt_tokens"] > 60
            return answer.json()["choices"][0]["message"]["content"], used["prompt_tokens_details"]["cached_tokens"]

        one, two, again = ask(1), ask(2), ask(1)
        assert one[1] == 0
        assert two[1] < 60 < again[1], "found again up to an image of other content"
        assert again[0] == one[0] != two[0]


def test_a_tokenizer_of_another_model_is_told(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["image_token_id"] == SOFT
    engine = FakeEngine([], image_tokens=70)
    info = vars(engine.info) | {"image_id": 9, "model_path": str(checkpoint)}
    bridge = type("Bridge", (), {"info": type(engine.info)(**info)})()
    with pytest.raises(CheckpointError, match="image_token_id 9, but its tokenizer has 55"):
        chat_service(bridge, NAMES)
