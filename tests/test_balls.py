"""The world of balls: its physics is exact, and its score sees each way in which a clip can be wrong."""

import csv
import itertools

import numpy as np
import pytest
import torch
from helpers import contents, flip_bit, stop_at

import model
from runtime import video
from runtime.files import read_jsonl
from tiny import balls, words
from tiny import codec as codecs
from tiny.balls import FAULTS, GRAVITY, SPEED, WALLS

LOW, HIGH = WALLS


def draw(n: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.uniform(*WALLS, n), rng.uniform(*SPEED, n) * rng.choice([-1, 1], n)


# ---- physics ---------------------------------------------------------------------------------------------------------


def test_floating_is_the_unfolded_line():
    """Without gravity the track is a straight line, folded between the walls: constant speed, exact bounces."""
    position, velocity = draw()
    tracks, span = balls.simulate(position, velocity, 0.0, 400), HIGH - LOW
    line = (position[:, None] - LOW + velocity[:, None] * np.arange(400)) % (2 * span)
    assert np.abs(tracks - (LOW + np.minimum(line, 2 * span - line))).max() < 1e-9


def test_falling_keeps_its_energy():
    """v²/2 − g·p is the same in all the frames that no bounce touches, before and after any number of bounces."""
    tracks = balls.simulate(*draw(), GRAVITY, 400)
    velocity = (tracks[:, 2:] - tracks[:, :-2]) / 2  # exact under constant acceleration
    free = np.abs(np.diff(tracks, 2) - GRAVITY) < 1e-9
    energy = np.where(free, velocity**2 / 2 - GRAVITY * tracks[:, 1:-1], np.nan)
    assert free.mean() > 0.8 and (~free).any(1).all()  # every ball bounces
    assert (np.nanmax(energy, 1) - np.nanmin(energy, 1)).max() < 1e-9


def test_falling_against_fine_steps():
    """A brute-force integration in 2000 steps a frame, its own bounce rule, agrees to within its own error."""
    position, velocity = draw(40)
    tracks, steps = balls.simulate(position, velocity, GRAVITY), 2000
    p, v, h = position.copy(), velocity.copy(), 1 / steps
    for frame in range(1, balls.FRAMES):
        for _ in range(steps):
            p, v = p + v * h + GRAVITY * h * h / 2, v + GRAVITY * h
            v = np.where((p < LOW) & (v < 0) | (p > HIGH) & (v > 0), -v, v)
        assert np.abs(tracks[:, frame] - p).max() < 0.02, frame


def test_a_ball_that_starts_on_a_wall():
    """Exactly at a wall, moving out or in: it stays inside and moves."""
    position, velocity, gravity = np.meshgrid(WALLS, (-1.0, -0.4, 0.4, 1.0), (0.0, GRAVITY))
    tracks = balls.simulate(position, velocity, gravity)
    assert tracks.min() >= LOW - 1e-9 and tracks.max() <= HIGH + 1e-9
    assert np.abs(tracks[..., 1] - tracks[..., 0]).min() > 0.3


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_a_clip_is_a_function_of_seed_and_index():
    """The same pictures whatever was rendered before; another index or seed, another clip."""
    frames, caption, track = balls.make_clip(0, 3)
    balls.make_clip(0, 4)
    again = balls.make_clip(0, 3)
    assert np.array_equal(frames, again[0]) and caption == again[1] and np.array_equal(track, again[2])
    assert frames.shape == (49, 64, 64, 3) and frames.dtype == np.uint8 and track.shape == (2, 49)
    assert not np.array_equal(frames, balls.make_clip(0, 4)[0]) and not np.array_equal(frames, balls.make_clip(1, 3)[0])


ROLES = (
    ("top", "middle", "bottom"), ("left", "centre", "right"), ("floats", "falls"), ("slowly", "quickly"),
    ("leftwards", "rightwards"), ("gently", "sharply"), ("upwards", "downwards"),
)  # fmt: skip


def test_captions_read_back():
    """The caption says the ninth, the direction and which half of the speeds along each axis, and floating or falling.

    As a set of words: the text encoder does not tell their order. There is room for the task prompts behind the text.
    """
    assert len(set(itertools.chain(*ROLES))) == sum(map(len, ROLES))
    rng, seen = np.random.default_rng(0), set()
    for index in range(3000):
        (position, velocity), falling = balls.draw_start(rng), bool(index % 2)
        said = balls.caption(position, velocity, falling).split()
        row, column, falls, across, aside, along, up = (
            next(i for i, word in enumerate(role) if word in said) for role in ROLES
        )
        assert sum(word in said for role in ROLES for word in role) == len(ROLES)
        for cell, at in ((column, position[0]), (row, position[1])):
            assert LOW + cell * (HIGH - LOW) / 3 <= at <= LOW + (cell + 1) * (HIGH - LOW) / 3
        assert (aside, up) == (velocity[0] > 0, velocity[1] > 0) and falls == falling == balls.falls(" ".join(said))
        assert (across, along) == tuple(np.abs(velocity) > np.mean(SPEED))
        seen.add(" ".join(said))
    tiny, encoder = model.PRESETS["tiny"], words.WordVectors()
    assert len(seen) == 9 * 2**5 and encoder.max_len == tiny.text_len - tiny.frames
    assert max(len(encoder.words(text)) for text in seen) <= encoder.max_len  # else the last word would be dropped
    with pytest.raises(ValueError, match="falls or floats, got 'a red ball'"):
        balls.falls("a red ball")


def test_faults_are_in_train_alone(monkeypatch, tmp_path):
    """In the stated shares, or half of them; a fault begins in mid-clip, and the clip is the good one until then."""
    monkeypatch.setattr(balls, "spots", lambda centres: np.zeros((1, 64, 64)))  # it takes most of the time
    kinds, half = {"freeze": 0, "cut": 0}, 0
    for index in range(300):
        good, bad, other = (balls.make_clip(0, index, share)[2] for share in (0.0, 1.0, 0.5))
        differs = np.abs(good - bad).max(0) > 1e-9
        half += not np.array_equal(good, other)
        if differs.any():
            assert 8 <= differs.argmax() <= 41
            kinds["freeze" if np.hypot(*(bad[:, -1] - bad[:, -9])) < 8 * balls.STILL else "cut"] += 1
    assert all(abs(count / 300 - FAULTS[kind]) < 0.08 for kind, count in kinds.items()), kinds
    assert abs(half / 300 - sum(FAULTS.values()) / 2) < 0.08

    splits = [balls.split_of(index, 700) for index in range(700)]
    assert [splits.count(split) for split in ("train", "align", "eval")] == [400, 200, 100]
    given, cfg = [], balls.Config(out=str(tmp_path), clips=7, faults=0.5)
    monkeypatch.setattr(balls.video, "write_mp4", lambda path, *_: path.touch())
    monkeypatch.setattr(balls, "make_clip", lambda seed, index, faults: given.append(faults) or ((), "", np.eye(2)))
    rows = [balls.write_clip(cfg, index) for index in range(7)]
    assert given == [0.5] * 4 + [0] * 3 and [row["split"] for row in rows] == splits[::100]


def test_a_frozen_clip_is_not_refused(chain):
    """prepare.py leaves out a clip whose picture stands still: all that the web-like base is to see come through it."""
    assert not read_jsonl(chain / "shards" / "rejects.jsonl")
    frames = [balls.make_clip(0, i, 1.0)[0] for i in range(40)]
    rows = list(csv.DictReader((chain / "clips" / "metadata.csv").open(encoding="utf-8")))[:40]
    scores = score(np.stack(frames), [row["caption"] for row in rows])
    assert 8 <= scores["frozen"].sum() <= 24 and not scores["valid"][scores["frozen"]].any()


def test_light_is_the_inverse_of_the_rendering():
    """For any light; the nearest mixture for colours that are none. A ball has its colour, the rest the wall's."""
    light = np.random.default_rng(0).random((3, 64, 64)).astype(np.float32)
    pictures = balls.render(light)
    assert pictures.dtype == np.float32 and np.abs(balls.light_of(pictures) - light).max() < 1e-5
    direction = balls.BALL - balls.WALL
    beside = np.cross(direction, [1, 0, 0])
    assert np.abs(balls.light_of(pictures + 0.1 * beside) - light).max() < 1e-5
    frame = balls.render(balls.spots(np.array([20.5, 40.5])))
    assert np.allclose(frame[40, 20], balls.BALL, atol=1e-5) and np.allclose(frame[0, 63], balls.WALL[0, 63], atol=0.01)


def test_detect_finds_the_ball():
    """Within a fraction of a pixel, wherever it is; none where there is none, or more than one."""
    for index in range(8):
        frames, _, track = balls.make_clip(0, index)
        centres, seen = balls.detect(balls.light_of(frames[None] / np.float32(255)))
        assert np.abs(centres[0] - track).max() < 0.7 and seen.all()
    spot = balls.spots(np.array([[[20.0, 20.0], [44.0, 20.0], [44.0, 44.0]]]))
    assert balls.detect(np.stack([spot[:, 0], 0.2 * spot[:, 0], spot.sum(1)], 1))[1].tolist() == [[True, False, False]]


def test_clips_of_a_folder(chain, tmp_path, monkeypatch):
    """metadata.csv has OpenVid-1M's columns, the captions and the splits, and the files hold what make_clip draws. A
    rendering that was cut keeps what it has and makes the rest, and what was damaged since.
    """
    rows = list(csv.DictReader((chain / "clips" / "metadata.csv").open(encoding="utf-8")))
    assert len(rows) == 80 and {"video", "caption", "motion score", "frame", "fps", "seconds", "split"} <= set(rows[0])
    for index in (0, 50):
        frames, caption, track = balls.make_clip(0, index, index == 0)
        assert rows[index]["caption"] == caption
        assert float(rows[index]["motion score"]) == pytest.approx(np.hypot(*np.diff(track)).mean(), abs=1e-3)
        back = video.read_clip(chain / "clips" / rows[index]["video"], None)
        assert np.abs(back.astype(int) - frames).mean() < 2.0  # H.264 is lossy
    cfg = balls.Config(out=str(tmp_path), clips=80)
    with stop_at(monkeypatch, balls, "make_clip", 3), pytest.raises(KeyboardInterrupt):
        for index in range(6):
            balls.write_clip(cfg, index)
    assert len(made := sorted(tmp_path.glob("*.mp4"))) == 3
    flip_bit(made[1])
    again = [balls.write_clip(cfg, index) for index in range(12)]
    assert [{k: str(v) for k, v in row.items()} for row in again] == rows[:12]
    made, before = contents(tmp_path), contents(chain / "clips")
    assert len(made) == 12 and made.items() <= before.items()  # byte for byte: all training begins with these files


# ---- score -----------------------------------------------------------------------------------------------------------


def score(frames, captions, *args):
    """Of pictures (B, T, h, w, 3) uint8."""
    return balls.score_clips(balls.light_of(frames / np.float32(255)), captions, *args)


def filmed(tracks) -> np.ndarray:
    """Light (B, T, h, w) of balls on tracks (B, 2, T)."""
    return balls.spots(np.moveaxis(np.asarray(tracks), 1, 2))


def true_paths(count: int, falling: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([balls.path(*balls.draw_start(rng), falling) for _ in range(count)])


def test_true_clips_score_near_perfect():
    frames, captions, tracks = zip(*(balls.make_clip(0, index) for index in range(24)))
    result = score(np.stack(frames), captions)
    assert result["valid"].all() and not result["frozen"].any() and not result["jump"].any()
    assert (result["traj"] < 0.7).all() and (result["shape"] < 0.01).all() and (result["score"] > -0.25).all()
    speed = np.hypot(*np.moveaxis(np.diff(tracks), 1, 0))
    assert np.abs(result["speed"] - speed).max() < 0.4
    assert np.allclose(result["dyn"], speed.mean(1), rtol=0.1)
    assert set(result) == {*balls.METRICS, "speed"} and all(len(v) == 24 for v in result.values())


def test_the_nearest_valid_path_is_the_true_one():
    """To within the bank's grid, falling or floating in one call, and also where the ball is seen half the time."""
    tracks = np.concatenate([true_paths(60, False), true_paths(60, True)])[::-1]
    falling, seen = np.repeat([True, False], 60), np.ones((120, 49), bool)
    for some in (seen, seen & (np.arange(49) % 2 == 0)):
        nearest = balls.nearest_valid(np.where(some[:, None], tracks, 99), some, falling)
        off = np.hypot(*np.moveaxis(nearest - tracks, 1, 0))
        assert off.max() < 1.5 and np.sqrt((off**2).mean(1)).max() < 0.7
    assert np.abs(balls.nearest_valid(tracks, seen, ~falling) - tracks).max() > 5


def test_real_clips_stay_valid_through_the_codec(chain):
    """99 of 100 of those that it was not fitted on; it has no seams and loses little of the shape."""
    frames, captions, _ = zip(*(balls.make_clip(9, index) for index in range(100)))
    codec = codecs.load(chain / "shards")
    x0 = torch.cat([codec.encode(video.to_pixels(clip)[None]) for clip in frames])
    result = balls.score(codec, x0, captions)
    assert x0.shape == (100, 28, 13, 1, 1) and result["valid"].mean() >= 0.99 and not result["frozen"].any()
    assert result["traj"].mean() < 0.6 and result["shape"].mean() < 0.02


def wrong_clips() -> dict[str, np.ndarray]:
    """Light (T, h, w) of a falling ball with a fault, by what is wrong."""
    good = filmed(true_paths(1, True))[0]
    held = np.concatenate([good[:24], np.repeat(good[24:25], 25, 0)])
    other = filmed([balls.path(np.array([15.0, 15.0]), np.array([0.5, 0.5]), True)])[0]
    return {
        "frozen": held,
        "cut": np.concatenate([good[:24], other[:25]]),
        "shuffled": good[np.random.default_rng(0).permutation(49)],
        "blurred": 0.5 * (np.roll(good, 6, 2) + np.roll(good, -6, 2)),
        "no ball": np.zeros_like(good),
        "goes out": np.where(np.arange(49)[:, None, None] < 24, good, 0),
        "two balls": good + np.roll(good[::-1], 30, (1, 2)),
    }


@pytest.mark.parametrize(
    "wrong, marks",
    [
        ("frozen", {"valid": False, "frozen": True, "jump": False}),
        ("cut", {"valid": False, "frozen": False, "jump": True}),
        ("shuffled", {"valid": False, "jump": True}),
        ("blurred", {"jump": False}),
        ("no ball", {"valid": False, "traj": balls.MISSING, "dyn": 0}),
        ("goes out", {"valid": False}),
        ("two balls", {"valid": False}),
    ],
)
def test_each_fault_is_marked(wrong, marks):
    """By the metric that it is for, and every one lowers the score."""
    clips = np.stack([filmed(true_paths(1, True))[0], wrong_clips()[wrong]])
    result = balls.score_clips(clips, ["a ball falls"] * 2)
    assert {name: result[name][1] for name in marks} == pytest.approx(marks)
    assert result["valid"][0] and not result["frozen"][0] and not result["jump"][0]
    assert result["score"][1] < result["score"][0] - 0.2
    if wrong == "blurred":
        assert result["shape"][1] > result["shape"][0] + 0.02
    if wrong == "no ball":
        assert np.isnan(result["speed"][1]).all() and not np.isnan(result["speed"][0]).any()


def test_wrong_physics_shows():
    """Floating where the caption says falling, and a bounce that loses half of its speed."""
    floating = true_paths(40, False)
    lossy = np.stack([balls.simulate(np.full(40, 40.0), np.linspace(0.9, 1.1, 40), 0.0), np.full((40, 49), 32.0)], 1)
    after = np.argmin(np.diff(lossy[:, 0]) > 0, axis=1) + 1
    for track, first in zip(lossy[:, 0], after):
        track[first:] = track[first] + (track[first:] - track[first]) / 2
    right, wrong = (balls.score_clips(filmed(floating), [word] * 40) for word in ("floats", "falls"))
    assert right["valid"].all() and (wrong["traj"] > right["traj"]).all() and wrong["valid"].mean() < 0.7
    assert not balls.score_clips(filmed(lossy), ["floats"] * 40)["valid"].any()


def test_what_freezes_late_is_not_valid():
    """Some are within VALID px of a path, of which they miss the end; they are marked all the same."""
    tracks = true_paths(40, False)
    tracks[..., 36:] = tracks[..., 35:36]
    result = balls.score_clips(filmed(tracks), ["floats"] * 40)
    assert (result["traj"] < balls.VALID).sum() > 10 and result["frozen"].all() and not result["valid"].any()


def test_what_does_not_move_is_not_valid():
    """A ball that is held still is never valid, wherever it is: a model cannot gain by standing still."""
    at = np.stack(np.meshgrid(*2 * [np.linspace(*WALLS, 9)]), -1).reshape(-1, 2, 1).repeat(49, 2)
    for word in ("floats", "falls"):
        result = balls.score_clips(filmed(at), [word] * len(at))
        assert not result["valid"].any() and result["frozen"].all() and (result["dyn"] < 0.01).all()


def test_slow_motion_shows_in_the_speeds():
    """Physics allows many slower motions, so `valid` cannot see that all are: the distance of their speeds does."""
    rng = np.random.default_rng(0)
    starts = [balls.draw_start(rng) for _ in range(60)]
    fast, slow = (
        balls.score_clips(filmed([balls.path(at, share * v, False) for at, v in starts]), ["floats"] * 60)
        for share in (1.0, 0.8)
    )
    assert fast["valid"].all() and slow["valid"].mean() > 0.9
    assert balls.wasserstein(slow["speed"], fast["speed"]) == pytest.approx(0.2 * fast["dyn"].mean(), rel=0.1)


def test_wasserstein_by_hand():
    """The area between two distributions' quantiles; what is not seen is left out; the order does not matter."""
    one = np.array([[0.0, 1.0], [2.0, np.nan]])
    assert balls.wasserstein(one, one[::-1]) == 0
    assert balls.wasserstein(one, one + 0.3) == pytest.approx(0.3) == balls.wasserstein(one + 0.3, one)
    assert balls.wasserstein(np.array([0.0, 0.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)  # quantiles 0 and q
    assert balls.wasserstein(np.zeros(5), np.full(7, 1.5)) == 1.5
    assert balls.wasserstein(np.full(5, np.nan), np.full(7, 1.5)) == 1.5  # no ball was seen: it does not move


def test_only_the_judged_frames_count():
    """The sweep scores generated frames apart: what is wrong elsewhere must not matter."""
    good, kept = filmed(true_paths(1, True)), slice(20, None)
    blurred = good.copy()
    blurred[:, 8:20] = 0.5 * (np.roll(good[:, 8:20], 6, 3) + np.roll(good[:, 8:20], -6, 3))  # the centres stay
    blurred[:, :10] = good[:, :1]
    expected, got = (balls.score_clips(clip, ["falls"], kept) for clip in (good, blurred))
    whole = balls.score_clips(blurred, ["falls"])
    assert got["shape"] == expected["shape"] and got["valid"] and not got["frozen"] and got["speed"].shape == (1, 28)
    assert got["traj"] == pytest.approx(expected["traj"], abs=0.7)
    assert whole["frozen"] and whole["score"] < expected["score"] - 0.2


def test_judged_frames_must_go_on_from_the_others():
    """A continuation that is valid in itself, but not of this beginning, is wrong."""
    good, other = filmed(true_paths(1, True)), filmed(true_paths(1, True, seed=5))
    spliced = np.concatenate([good[:, :37], other[:, 37:]], 1)
    assert balls.score_clips(other, ["falls"])["valid"]
    assert not balls.score_clips(spliced, ["falls"], slice(37, None))["valid"]
