"""Videos on disk: the official jsonl layouts and MSRVTT's json, as examples; what is refused, and where."""

import json
import pickle
from pathlib import Path
from random import Random

import numpy as np
import pytest
from filming import write_video
from PIL import Image

from mplug2.data.annotations import CaptionLines, QuestionLines, VideoDataInfo, read_answers
from mplug2.data.augment import RandomCrop
from mplug2.data.clips import frame_indices
from mplug2.data.pixels import Preprocessing
from mplug2.data.stream import Feed, collate, stream
from mplug2.data.videos import Videos
from mplug2.data.wording import Official
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import DataError

VOCABULARY = str(Path(__file__).parent / "golden" / "aux" / "vocab.txt")
GREY = list(range(20, 240, 10))
SMALL = Preprocessing(height=8, width=12, frames=3)


def lines(path: Path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four videos of one kind each, and the three layouts."""
    videos = tmp_path / "videos"
    (videos / "more").mkdir(parents=True)
    write_video(videos / "video0.mp4", GREY)
    write_video(videos / "more" / "video1.avi", GREY, "mpeg4")
    write_video(videos / "video2.webm", GREY, "libvpx")
    frames = [Image.new("RGB", (20, 10), (level, level, level)) for level in GREY]
    frames[0].save(videos / "tumblr_3.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    lines(
        tmp_path / "train.jsonl",
        {"video_id": "video0", "caption": "A man, cooking!"},
        {"video_id": "video0", "caption": "a man"},
        {"video_id": "more/video1", "caption": "a dog"},
    )
    lines(
        tmp_path / "test.jsonl",
        {"video_id": "video2", "golden_captions": ["A cat.", "the cat"]},
        {"video_id": "tumblr_3", "golden_caption": ["a boy"]},
    )
    lines(
        tmp_path / "qa.jsonl",
        {"video_id": "video0", "question": "What is  a man doing?", "answer": "Cooking"},
        {"video_id": "tumblr_3", "question": "who is running", "answer": "a boy"},
    )
    kinds = {"video0": "train", "more/video1": "validate", "video2": "test"}
    content = {
        "info": {"year": "2016"},
        "videos": [{"video_id": video, "split": split, "id": 0} for video, split in kinds.items()],
        "sentences": [
            {"video_id": video, "caption": f"{word} {video[-1]}", "sen_id": 0}
            for word in ("one", "two")
            for video in kinds
        ],
    }
    (tmp_path / "videodatainfo.json").write_text(json.dumps(content))
    return tmp_path


def captions(root: Path, **fields) -> Videos:
    return Videos(**{"root": str(root), "annotations": CaptionLines(), "preprocessing": SMALL} | fields)


QUESTIONS = QuestionLines(train="qa.jsonl", test="qa.jsonl")
PUBLIC = VideoDataInfo(train="videodatainfo.json", validation="videodatainfo.json", test="videodatainfo.json")


def test_every_training_caption_is_an_example_and_every_test_video(root: Path):
    data = captions(root)
    train, test = data.source("train"), data.source("test")
    assert [train[i]["caption"] for i in range(len(train))] == ["a man cooking", "a man", "a dog"]
    assert [train[i]["video"] for i in range(len(train))] == ["video0", "video0", "more/video1"]
    assert [test[i]["captions"] for i in range(len(test))] == [("A cat.", "the cat"), ("a boy",)]
    assert [test[i]["caption"] for i in range(len(test))] == ["A cat.", "a boy"]
    assert [test[i]["index"] for i in range(len(test))] == [0, 1]


def test_captions_of_one_video_on_several_test_lines_are_one_example(root: Path):
    rows = [("video0", "a"), ("video2", "b"), ("video0", "c")]
    lines(root / "test.jsonl", *({"video_id": video, "caption": text} for video, text in rows))
    test = captions(root).source("test")
    assert [test.texts(i)["captions"] for i in range(len(test))] == [("a", "c"), ("b",)]


@pytest.mark.parametrize("index, split", [(0, "train"), (2, "train"), (0, "test"), (1, "test")])
def test_mp4_avi_webm_and_gif_become_clips_of_the_size_asked_for(root: Path, index, split):
    clips = captions(root, train_sampling="uniform").source(split)[index]["clips"]
    assert clips.shape == (3, 8, 12, 3) and clips.dtype == np.uint8
    wanted = [GREY[i] for i in frame_indices(len(GREY), 3)]
    np.testing.assert_allclose(clips.mean((1, 2, 3)), wanted, atol=5)


def test_questions_and_answers_of_training_are_worded_and_the_truth_is_left_alone(root: Path):
    data = captions(root, annotations=QUESTIONS)
    train, test = data.source("train")[0], data.source("test")[0]
    assert train["question"] == test["question"] == "what is a man doing"
    assert (train["answer"], test["answer"]) == ("cooking", "Cooking")
    known = data.source("train").texts(0)
    assert known == {"question": "what is a man doing", "answer": "Cooking"}


def test_every_training_answer_is_an_example_and_a_test_question_has_them_all(root: Path):
    said = {"video_id": "video0", "question": "what colour", "answers": ["red", "pink", "red"]}
    lines(root / "qa.jsonl", said, {"video_id": "video2", "question": "who", "answer": "a boy"})
    train, test = (captions(root, annotations=QUESTIONS).written(split) for split in ("train", "test"))
    assert [train.texts(i)["answer"] for i in range(len(train))] == ["red", "pink", "red", "a boy"]
    several = {"question": "what colour", "answer": "red", "answers": ("red", "pink", "red")}
    assert [test.texts(i) for i in range(len(test))] == [several, {"question": "who", "answer": "a boy"}]


def test_official_wording_is_what_the_official_tokenizer_reads(root: Path):
    train = captions(root, wording=Official()).source("train")
    assert train[1]["caption"] == "a video ofa man[SEP]" and train.texts(1)["caption"] == "a man"
    ids = OfficialWordPiece(VOCABULARY).encode(train[1]["caption"], 8).tolist()
    assert ids == [101, 1, 6, 7, 68, 2, 102, 0]
    asked = captions(root, annotations=QUESTIONS, wording=Official()).source("train")[0]
    assert (asked["question"], asked["answer"]) == ("what is  a man doing", "Cooking[SEP]")


def test_the_public_msrvtt_json_is_parted_by_its_own_splits(root: Path):
    data = captions(root, annotations=PUBLIC)
    train, validation, test = (data.source(split) for split in ("train", "validation", "test"))
    assert [train.texts(i)["caption"] for i in range(len(train))] == ["one 0", "two 0"]
    assert [validation.texts(i)["captions"] for i in range(len(validation))] == [("one 1", "two 1")]
    assert test[0]["video"] == "video2" and test[0]["captions"] == ("one 2", "two 2")


def test_parts_of_msrvtt_can_train_together(root: Path):
    together = VideoDataInfo(train="videodatainfo.json", train_parts=("train", "validate"))
    assert len(captions(root, annotations=together).source("train")) == 4


def test_each_pass_shows_other_frames_and_the_same_index_the_same(root: Path):
    train = captions(root, passes=4).source("train")
    assert len(train) == 12 and train[1]["caption"] == train[4]["caption"] == "a man"
    shown = {train[index]["clips"].tobytes() for index in (1, 4, 7, 10)}
    assert len(shown) > 1
    again = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(again[4]["clips"], train[4]["clips"])
    assert len(captions(root, passes=4).source("test")) == 2


def test_each_epoch_shows_other_frames_in_another_view_and_the_first_is_the_usual_one(root: Path):
    train = captions(root, train_view=RandomCrop(flip=0.0, changes=0)).source("train")
    seen = [train.at(1, epoch) for epoch in range(6)]
    assert len({example["clips"].tobytes() for example in seen}) == 6
    assert {(example["index"], example["caption"]) for example in seen} == {(1, "a man")}
    np.testing.assert_array_equal(seen[0]["clips"], train[1]["clips"])
    np.testing.assert_array_equal(seen[3]["clips"], train.at(1, 3)["clips"])


def test_views_of_training_and_after_it_are_the_ones_given(root: Path):
    def black(frames: np.ndarray, size: Preprocessing, rng: Random) -> np.ndarray:
        return np.zeros((len(frames), size.height, size.width, 3), np.uint8)

    data = captions(root, train_view=black)
    assert not data.source("train")[0]["clips"].any() and data.source("test")[0]["clips"].all()


def test_a_stream_and_a_batch_of_a_split_read_them(root: Path):
    tokenizer = WordPiece(VOCABULARY)
    feed = Feed(captions(root, passes=2), 2, {"caption": 6})
    steps = stream({"caption": feed}, tokenizer=tokenizer, threads=0)
    batch = next(steps)["caption"]
    steps.close()
    assert batch["clips"].shape == (2, 3, 8, 12, 3) and batch["caption"].shape == (2, 6)
    test = captions(root, annotations=QUESTIONS).source("test")
    asked = collate([test[index] for index in range(len(test))], {"question": 8}, tokenizer, seed=0)
    assert [tokenizer.decode(row) for row in asked["question"]][1:] == ["who is running"]


def test_candidate_answers_are_keys_of_an_object_or_answers_of_lines(root: Path):
    (root / "answers.json").write_text('{"cooking": 0, "a boy": 1}')
    assert read_answers(root / "answers.json") == ["cooking", "a boy"]
    assert read_answers(root / "qa.jsonl") == ["Cooking", "a boy"]
    (root / "answers.json").write_text('["cooking"]')
    with pytest.raises(DataError, match="answers.json: expected an object"):
        read_answers(root / "answers.json")
    for strange in ('{"": 0}', '{"\\ud800": 0}'):
        (root / "answers.json").write_text(strange)
        with pytest.raises(DataError, match='answers.json: "answer"'):
            read_answers(root / "answers.json")


# --- refusals


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", r"line 2: expected an object, got \[1\]"),
        ('{"video": "a", "caption": "b"}', 'line 2: has no "video_id"; it has "video", "caption"'),
        ('{"video_id": "a", "captoin": "b"}', 'has no "caption"; it has "video_id", "captoin"$'),
        ('{"video_id": "a", "caption": 3}', 'line 2: "caption" must be a text, it is 3'),
        ('{"video_id": "a", "caption": " "}', '"caption" must be a text'),
        (
            '{"video_id": "a", "golden_captions": []}',
            '"golden_captions" must be a list of texts, it is empty',
        ),
        ('{"video_id": "a", "golden_captions": ["b", null]}', '"golden_captions" must be a text, it is null'),
        ('{"video_id": "a", "caption": "\\ud800"}', "half of a character"),
        ('{"video_id": "../a", "caption": "b"}', r'line 2: "../a" is not the path of a file below'),
        ('{"video_id": "/etc/passwd", "caption": "b"}', "not the path of a file below"),
        ('{"video_id": "x/../../a", "caption": "b"}', "not the path of a file below"),
        ('{"video_id": "..\\\\a", "caption": "b"}', "not the path of a file below"),
        ('{"video_id": "a\\u0000", "caption": "b"}', "not the path of a file below"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(root: Path, line: str, reason: str):
    good = '{"video_id": "video0", "caption": "a man"}\n'
    (root / "train.jsonl").write_text(good + line + "\n")
    with pytest.raises(DataError, match=reason) as caught:
        captions(root).source("train")
    assert "train.jsonl, line 2" in str(caught.value) and len(str(caught.value)) < 400


def test_bytes_that_are_not_utf8_are_refused_with_their_line(root: Path):
    (root / "train.jsonl").write_bytes(b'{"video_id": "video0", "caption": "a"}\n{"video_id": "\xff"}\n')
    with pytest.raises(DataError, match="train.jsonl, line 2: not UTF-8"):
        captions(root).source("train")


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_no_matter(root: Path):
    line = '{"video_id": "video0", "caption": "a\u2028man"}\r\n'
    (root / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}".encode())
    train = captions(root).source("train")
    assert [train.texts(i)["caption"] for i in range(len(train))] == ["a\u2028man"] * 2


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda it: it.pop("videos"), 'has no "videos"'),
        (lambda it: it.update(videos={}), '"videos" must be a list'),
        (lambda it: it["videos"].append(3), r"videos\[3\]: expected an object, got 3"),
        (
            lambda it: it["sentences"].append({"video_id": "video9", "caption": "a"}),
            'video_id "video9" is not',
        ),
        (lambda it: it["videos"][0].update(video_id="../x"), r'videos\[0\]: "../x" is not the path'),
        (
            lambda it: it["videos"][0].update(split="training"),
            'no video has split "train".*did you mean "training"',
        ),
    ],
)
def test_a_bad_msrvtt_json_is_refused_with_its_place(root: Path, change, reason: str):
    content = json.loads((root / "videodatainfo.json").read_text())
    change(content)
    (root / "videodatainfo.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=reason):
        captions(root, annotations=PUBLIC).source("train")


def test_missing_videos_are_counted_and_the_first_is_named_with_its_line(root: Path):
    (root / "videos" / "more" / "video1.avi").unlink()
    with pytest.raises(DataError, match='line 3: no video "more/video1" in .*of 2 videos.*1 are missing'):
        captions(root).source("train")


def test_a_broken_video_is_refused_by_name_when_it_is_read(root: Path):
    (root / "videos" / "video0.mp4").write_bytes(b"not a video")
    with pytest.raises(DataError, match="video0.mp4"):
        captions(root).source("train")[0]


def test_missing_files_splits_and_folders_outside_the_root_are_refused(root: Path):
    for data, split, reason in (
        (captions(root), "validation", "names no file for the validation split"),
        (captions(root), "tests", 'unknown split "tests".*did you mean "test"'),
        (
            captions(root, annotations=CaptionLines(train="absent.jsonl")),
            "train",
            "cannot read .*absent.jsonl",
        ),
        (
            captions(root, annotations=CaptionLines(train="../x.jsonl")),
            "train",
            "not the path of a file below",
        ),
        (captions(root, videos="../videos"), "train", "not the path of a file below"),
    ):
        with pytest.raises(DataError, match=reason):
            data.source(split)
    (root / "train.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the train split of .* holds no example"):
        captions(root).source("train")
