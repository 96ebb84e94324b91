"""The method's invariants, checked in seconds on a small random model: for whoever changes the loss or the model.

    python -m experiments.invariants

prints each in a sentence, and exits with code 1 if one does not hold. It has no options.
"""

import copy
import dataclasses
import math
import sys

import torch

import asymdpo
import flow
import model


@torch.no_grad()
def check_model(net, x0, noise, text, t):
    """Invariants of the model as Φ and as text-to-video model."""
    x_t = flow.add_noise(x0, noise, t)
    plain, none_given = net(x_t, t, text), torch.zeros(4, 13, dtype=torch.bool)
    each = net(x_t, t[:, None].repeat(1, 13), text)
    yield torch.allclose(plain, each, atol=1e-5), "a time for each frame, all equal, is the one-time model, to 1e-5"
    for where in ("text", "frame"):
        model.add_task_prompt(net, 13, where)
        same = torch.allclose(plain, net(x_t, t, text, none_given), atol=1e-5)
        yield same, f"without given frames, zero task prompts ({where}) are the text-to-video model, to 1e-5"
    cond_mask = torch.arange(13) < torch.tensor([1, 4, 7, 12])[:, None]
    made = flow.euler(net, noise, text, flow.time_grid(3, 4.0), x0, cond_mask)
    given = cond_mask[:, None, :, None, None].expand_as(x0)
    yield torch.equal(made[given], x0[given]), "the given frames of a continuation are the real ones, bit for bit"
    net.prefix = True
    kept = model.Continuation(net, x0, text, 4)(x_t, t)[:, :, 4:]
    cond_mask = (torch.arange(13) < 4).expand(4, -1)
    whole = net(torch.where(cond_mask[:, None, :, None, None], x0, x_t), t, text, cond_mask)[:, :, 4:]
    yield torch.allclose(kept, whole, atol=1e-5), "given frames that see one another alone are computed once, to 1e-5"
    net.prefix = False
    net.task_prompt = None


def check_loss(net, batch, n1, n2):
    """Invariants of the loss, before and after a few steps of training. batch: chosen, rejected, text, noise, t."""
    ln2 = torch.full((4,), math.log(2))
    base = net.state_dict()
    before = copy.deepcopy(base)
    parameters = model.add_lora(net, 4, 4, "attn")
    for form, words, expected in (("outside", "ln 2 / K", ln2 / (13 - n1)), ("inside", "ln 2", ln2)):
        cfg = asymdpo.Config(beta=800.0, form=form)
        loss, parts = asymdpo.asymdpo_loss(cfg, asymdpo.predict(net, *batch), n1, n2)
        exact = bool((parts["S"] == 0).all()) and torch.allclose(loss, expected, rtol=1e-6)
        yield exact, f"step 0, {form}: S = 0 exactly, loss = {words}"
    cfg = asymdpo.Config(beta=25.0, form="inside")
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for _ in range(3):
        asymdpo.asymdpo_loss(cfg, asymdpo.predict(net, *batch), n1, n2)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = all(map(torch.equal, base.values(), before.values()))
    yield kept, "the reference's weights are the same, bit for bit, after three steps"
    prediction = [a.detach() for a in asymdpo.predict(net, *batch)]
    loss, parts = asymdpo.asymdpo_loss(cfg, prediction, n1, n2)
    _, swapped = asymdpo.asymdpo_loss(cfg, [prediction[i] for i in (1, 0, 3, 2, 5, 4)], n1, n2)
    negated = torch.equal(parts["S"], -swapped["S"]) and bool((parts["S"] != 0).all())
    yield negated, "swapping winner and loser negates S"
    singles = zip(*(a.split(1) for a in (*prediction, n1, n2)))
    alone = torch.cat([asymdpo.asymdpo_loss(cfg, one[:6], *one[6:])[0] for one in singles])
    yield torch.equal(loss, alone), "a pair's loss does not depend on the other pairs of its batch"
    shared = (torch.arange(13) < n1[:, None])[:, None, :, None, None]
    for words, value in (("moved by 1000", 1e3), ("NaN", math.nan)):
        moved = [torch.where(shared, a + value, a).requires_grad_() for a in prediction]
        moved_loss, _ = asymdpo.asymdpo_loss(cfg, moved, n1, n2)
        gradient = torch.autograd.grad(moved_loss.sum(), moved[0])[0]
        silent = torch.equal(loss, moved_loss) and bool(gradient.isfinite().all())
        silent = silent and bool((gradient.masked_select(shared) == 0).all())
        yield silent, f"frames before N1, {words}: the same loss bit for bit, and a gradient of exactly 0 there"


def main() -> int:
    torch.manual_seed(0)
    net = model.init_from_scratch(model.DiT(dataclasses.replace(model.PRESETS["tiny"], num_layers=1)), seed=0)
    torch.nn.init.normal_(net.time_projection[1].weight, std=0.02)  # time must matter
    chosen, rejected, noise = torch.randn(3, 4, 28, 13, 2, 3)
    text, t = torch.randn(4, 7, 32), torch.rand(4)
    n1, n2 = torch.tensor([1, 3, 7, 5]), torch.tensor([11, 12, 13, 11])
    results = [*check_model(net, chosen, noise, text, t)]
    results += check_loss(net, (chosen, rejected, text, noise, t), n1, n2)
    for holds, words in results:
        print(f"{'ok  ' if holds else 'FAIL'}  {words}")
    return int(not all(holds for holds, _ in results))


if __name__ == "__main__":
    sys.exit(main())
