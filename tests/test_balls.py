"""The world of balls: its physics is exact, and its score sees each way in which a clip can be wrong."""

import csv

import numpy as np
import pytest
from helpers import contents, stop_at

from runtime import video
from tiny import balls
from tiny.balls import GRAVITY, SPEED, WALLS

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
    frames, caption, tracks = balls.make_clip(0, 3)
    balls.make_clip(0, 4)
    again = balls.make_clip(0, 3)
    assert np.array_equal(frames, again[0]) and caption == again[1] and np.array_equal(tracks, again[2])
    assert frames.shape == (49, 64, 64, 3) and frames.dtype == np.uint8
    assert not np.array_equal(frames, balls.make_clip(0, 4)[0]) and not np.array_equal(frames, balls.make_clip(1, 3)[0])


def test_captions_read_back():
    """read_caption is the inverse of caption, for every one there is."""
    sets = [(c,) for c in range(3)] + [(a, b) for a in range(3) for b in range(a + 1, 3)]
    captions = {balls.caption(colours, falling): (colours, falling) for colours in sets for falling in (False, True)}
    assert len(captions) == 12
    assert all(balls.read_caption(text) == truth for text, truth in captions.items())
    assert balls.caption((0, 2), True) == "a red ball and a blue ball fall"
    assert balls.caption((1,), False) == "a green ball floats"


def test_detect_finds_the_balls():
    """Centres within a fraction of a pixel and mass 1, wherever the ball is; no mass where there is none."""
    for index in range(8):
        frames, caption, tracks = balls.make_clip(0, index)
        centre, mass = balls.detect(frames / 255)
        colours, _ = balls.read_caption(caption)
        for ball, c in enumerate(colours):
            assert np.abs(centre[c] - tracks[ball]).max() < 1.0 and np.abs(mass[c] - 1).max() < 0.2
        assert all(mass[c].max() < 0.01 for c in range(3) if c not in colours)


def test_clips_of_a_folder(chain, tmp_path, monkeypatch):
    """metadata.csv has OpenVid-1M's columns and the clips' captions, and the files hold what make_clip draws. A
    rendering that was cut keeps what it has and makes the rest.
    """
    rows = list(csv.DictReader((chain / "clips" / "metadata.csv").open(encoding="utf-8")))
    assert len(rows) == 80 and {"video", "caption", "motion score", "frame", "fps", "seconds"} <= set(rows[0])
    for index in (0, 41):
        frames, caption, _ = balls.make_clip(0, index)
        assert rows[index]["caption"] == caption
        back = video.read_clip(chain / "clips" / rows[index]["video"], None)
        assert np.abs(back.astype(int) - frames).mean() < 2.0  # H.264 is lossy
    with stop_at(monkeypatch, balls, "make_clip", 3), pytest.raises(KeyboardInterrupt):
        for index in range(6):
            balls.write_clip(str(tmp_path), 0, index)
    assert len(list(tmp_path.iterdir())) == 3
    again = [balls.write_clip(str(tmp_path), 0, index) for index in range(12)]
    assert [{k: str(v) for k, v in row.items()} for row in again] == rows[:12]
    made, before = contents(tmp_path), contents(chain / "clips")
    assert len(made) == 12 and made.items() <= before.items()  # byte for byte: all training begins with these files


# ---- score -----------------------------------------------------------------------------------------------------------


def score(frames, caption, *args):
    return balls.score_clip(frames.astype(np.float32), caption, *args)


@pytest.mark.parametrize("index", range(6))
def test_a_true_clip_scores_near_perfect(index):
    frames, caption, tracks = balls.make_clip(0, index)
    result = score(frames / 255, caption)
    assert result["traj"] < 0.5 and result["presence"] == 1 and result["shape"] < 0.01 and result["score"] > -0.25
    speed = np.sqrt((np.diff(tracks, axis=-1) ** 2).sum(1)).mean()
    assert result["dyn"] == pytest.approx(speed, rel=0.1)


def two_balls():
    """A true clip of two falling balls in [0, 1], and its caption."""
    for index in range(50):
        frames, caption, _ = balls.make_clip(0, index)
        colours, falling = balls.read_caption(caption)
        if len(colours) == 2 and falling:
            return frames / 255, caption, colours
    raise AssertionError


def test_wrong_clips_worsen_the_right_metric():
    """Each fault shows in its own metric, and every fault in the score."""
    good, caption, colours = two_balls()
    base, first, other = score(good, caption), colours[0], ({0, 1, 2} - set(colours)).pop()

    shuffled = good[np.random.default_rng(0).permutation(49)]
    jump = np.concatenate([good[:24], good[40:], good[24:40]])  # each piece is right, the clip is not
    missing, extra, blurred, late = good.copy(), good.copy(), good.copy(), good.copy()
    missing[..., first] = 0
    extra[..., other] = good[..., first]
    blurred[..., first] = 0.5 * (np.roll(good[..., first], 6, 1) + np.roll(good[..., first], -6, 1))
    late[20:, ..., first] = 0
    frozen = np.repeat(good[:1], 49, 0)

    assert score(shuffled, caption)["traj"] > 4 and score(shuffled, caption)["dyn"] > 3 * base["dyn"]
    assert score(jump, caption)["traj"] > base["traj"] + 1
    for wrong, presence in ((missing, 2 / 3), (extra, 2 / 3), (late, 1 - 29 / 49 / 3)):
        assert score(wrong, caption)["presence"] == pytest.approx(presence, abs=1e-6)
    assert score(missing, caption)["traj"] > 7 and score(late, caption)["traj"] > 4
    assert score(blurred, caption)["shape"] > base["shape"] + 0.02
    assert score(frozen, caption)["traj"] > base["traj"] + 2 and score(frozen, caption)["dyn"] < 0.01 < base["dyn"]
    for wrong in (shuffled, jump, missing, extra, blurred, late, frozen):
        assert score(wrong, caption)["score"] < base["score"] - 0.2


def test_wrong_physics_shows():
    """A ball that floats where the caption says it falls is not valid, nor is one that bounces with loss."""
    good, caption, colours = two_balls()
    tracks = balls.draw_motion(np.random.default_rng(1), 2, falling=False)
    floating = np.zeros_like(good)
    for c, track in zip(colours, tracks, strict=True):
        floating[..., c] = balls.spots(track.T)
    assert score(floating, caption)["traj"] > score(good, caption)["traj"] + 0.5
    assert score(floating, caption.replace("fall", "float"))["traj"] < 0.5


def test_only_the_judged_frames_count():
    """The sweep scores generated frames apart: what is wrong elsewhere must not matter."""
    good, caption, colours = two_balls()
    blurred, kept = good.copy(), slice(20, None)
    blurred[:20] = 0.5 * (np.roll(good[:20], 6, 1) + np.roll(good[:20], -6, 1))  # the centres stay
    blurred[:5] = 0
    expected, got = score(good, caption, kept), score(blurred, caption, kept)
    assert got["presence"] == expected["presence"] == 1 and got["shape"] == expected["shape"]
    assert got["traj"] == pytest.approx(expected["traj"], abs=0.3)
    assert score(blurred, caption)["score"] < expected["score"] - 0.2


def test_judged_frames_must_go_on_from_the_others():
    """A continuation that is valid in itself, but not of this beginning, is wrong."""
    good, caption, colours = two_balls()
    another = good.copy()
    for c, track in zip(colours, balls.draw_motion(np.random.default_rng(5), 2, falling=True), strict=True):
        another[..., c] = balls.spots(track.T)
    assert score(another, caption)["traj"] < 0.5
    spliced = np.concatenate([good[:37], another[37:]])
    assert score(spliced, caption, slice(37, None))["traj"] > 3
