"""Sets are found where they are said to be, or downloaded once, and never taken for another."""

import hashlib
import os
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from deepred_pl import sources
from deepred_pl.batch.main import main
from deepred_pl.batch.plan import find_images
from deepred_pl.data import RestorationDataModule
from deepred_pl.images import read_image
from deepred_pl.sources import find_image, find_set

CONTENT = b"not an image, but content to be told from other content" * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server in the place of the public one, the cache empty.

    `served` maps the path of an address to what is sent for it: bytes, or a pair of bytes and the
    length that is announced for them. `asked` counts the requests.
    """

    class Handler(BaseHTTPRequestHandler):
        served: ClassVar[dict[str, bytes | tuple[bytes, int]]] = {}
        asked: ClassVar[Counter[str]] = Counter()

        def do_GET(self) -> None:
            self.asked[self.path] += 1
            answer = self.served.get(self.path)
            if answer is None:
                self.send_error(404)
                return
            body, length = answer if isinstance(answer, tuple) else (answer, len(answer))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/{{repository}}/{{commit}}/{{path}}"
    monkeypatch.setattr(sources, "ADDRESS", address)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.delenv("DEEPRED_DATA", raising=False)
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Rows of `sources.csv` whose digests are of contents that a test can make."""

    def write(folder: str, **contents: bytes) -> None:
        rows = ["folder,file,sha256,repository,commit,path"]
        for name, content in contents.items():
            digest = hashlib.sha256(content).hexdigest()
            rows.append(f"{folder},{name}.png,{digest},someone/images,0123abc,{name}.png")
        (tmp_path / "sources.csv").write_text("\n".join(rows) + "\n")
        monkeypatch.setattr(sources, "TABLE", tmp_path / "sources.csv")

    return write


def test_what_is_downloaded_is_the_file_and_is_not_downloaded_again(server, table):
    table("set5", head=CONTENT)
    server.served["/someone/images/0123abc/head.png"] = CONTENT
    path = find_image("set:set5/head")
    assert path.read_bytes() == CONTENT
    assert find_set("set:set5") == [path]
    assert server.asked == {"/someone/images/0123abc/head.png": 1}


def test_another_file_is_refused_and_leaves_nothing(server, table, tmp_path):
    table("set5", head=CONTENT)
    server.served["/someone/images/0123abc/head.png"] = CONTENT[:-1] + b"!"
    with pytest.raises(OSError, match=r"(?s)SHA256 hash .*save the file as .*head\.png"):
        find_image("set:set5/head")
    assert not any(p.is_file() for p in (tmp_path / "cache").rglob("*"))


def test_a_missing_file_says_which_and_where_to_put_it(server, table):
    table("set5", head=CONTENT)
    with pytest.raises(OSError, match=r"0123abc/head\.png, got 404 .*save the file as"):
        find_image("set:set5/head")


def test_an_interrupted_transfer_leaves_nothing_and_the_next_one_succeeds(server, table, tmp_path):
    table("set5", head=CONTENT)
    server.served["/someone/images/0123abc/head.png"] = (CONTENT[:1000], len(CONTENT))
    with pytest.raises(OSError, match=r"head\.png, got IncompleteRead.*save the file as"):
        find_image("set:set5/head")
    assert not any(p.is_file() for p in (tmp_path / "cache").rglob("*"))
    server.served["/someone/images/0123abc/head.png"] = CONTENT
    assert find_image("set:set5/head").read_bytes() == CONTENT


def test_without_a_network_it_says_how_to_place_the_file_by_hand(server, table, monkeypatch):
    table("set5", head=CONTENT)
    monkeypatch.setattr(sources, "ADDRESS", "http://127.0.0.1:9/{repository}/{commit}/{path}")
    with pytest.raises(OSError, match="save the file as") as caught:
        find_image("set:set5/head")
    assert len(str(caught.value)) < 600 and "DEEPRED_DATA" in str(caught.value)
    assert "refused" in str(caught.value)  # the cause, and not what was tried
    by_hand = Path(str(caught.value).split("save the file as ")[1])
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    by_hand.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"expected the published head\.png .*replace it with"):
        find_image("set:set5/head")
    by_hand.write_bytes(CONTENT)
    assert find_image("set:set5/head") == by_hand


def test_a_folder_of_sets_is_taken_before_the_network(server, table, tmp_path, monkeypatch):
    table("ncsr_deblur", leaves=CONTENT)
    (tmp_path / "mine" / "ncsr_deblur").mkdir(parents=True)
    (tmp_path / "mine" / "ncsr_deblur" / "leaves.png").write_bytes(CONTENT)
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path / "mine"))
    assert find_set("set:ncsr") == [tmp_path / "mine" / "ncsr_deblur" / "leaves.png"]
    assert not server.asked


def test_a_folder_without_the_set_says_what_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected set5/baby\.png in DEEPRED_DATA="):
        find_set("set:set5")
    assert not server.asked


def test_another_file_in_the_folder_is_refused(table, tmp_path, monkeypatch):
    table("set5", head=CONTENT)
    (tmp_path / "set5").mkdir()
    (tmp_path / "set5" / "head.png").write_bytes(b"my head")
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"published head\.png .*another file .*set5/head\.png"):
        find_image("set:set5/head")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("set:set6/head", "expected one of the sets cbm3d9, set5, set14, ncsr, inpainting, got"),
        ("set:set5/tail", "with one of baby, bird, butterfly, head, woman, got set:set5/tail"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_image(name)


def test_masks_are_no_images_of_their_set(table, tmp_path, monkeypatch):
    table("dip_inpainting", kate=b"a", kate_mask=b"b", barbara=b"c")
    for name, content in {"kate": b"a", "kate_mask": b"b", "barbara": b"c"}.items():
        path = tmp_path / "dip_inpainting" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path))
    assert [p.stem for p in find_set("set:inpainting")] == ["kate"]
    assert find_image("set:inpainting/barbara").stem == "barbara"


def test_the_shipped_table_names_each_file_once_by_commit_and_digest():
    files = [file for name in sources.FOLDERS for file in sources._files(name)]
    assert len({(file.folder, file.file) for file in files}) == len(files) == 40
    assert all(len(file.sha256) == 64 and len(file.commit) == 40 for file in files)


def test_sets_are_read_by_name_everywhere(table, tmp_path, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    path = tmp_path / "set5" / "head.png"
    path.parent.mkdir()
    Image.fromarray(levels).save(path)
    table("set5", head=path.read_bytes())
    monkeypatch.setenv("DEEPRED_DATA", str(tmp_path))
    image, _ = read_image("set:set5/head")
    assert (image[0].movedim(0, -1).mul(255).round().numpy() == levels).all()
    data = RestorationDataModule(ground_truth="set:set5/head", crop=40)
    data.setup()
    assert (data.problem.ground_truth == image[..., 4:44, 12:52]).all()
    assert [(s.name, s.path) for s in find_images(["set:set5"])] == [("head", os.fspath(path))]


def test_an_unknown_set_is_one_line_of_the_batch(tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["--config=denoising", "--ground_truth", "set:set6", "--out", str(tmp_path / "out")])
    message = str(caught.value)
    assert message.startswith("deepred-batch: error: expected one of the sets")
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
