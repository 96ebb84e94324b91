"""The processes that torchrun started: who this one is, its device, and the sums over all of them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

from runtime import roll
from runtime.options import UserError

STEP_TIMEOUT = 600.0  # seconds that one step's collectives may take: longer, and a process is stopped or hangs


@dataclasses.dataclass(frozen=True)
class Group:
    """This process among those that torchrun started; alone, on the CPU, by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    kernels: str = ""  # who computes: "triton", "torch", or nothing to tell
    step_timeout: float = STEP_TIMEOUT

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def node_size(self) -> int:
        """Processes of each node."""
        return _number("LOCAL_WORLD_SIZE", self.size)

    @property
    def place_in_node(self) -> int:
        return self.rank % self.node_size

    @property
    def mesh(self) -> DeviceMesh:
        """All processes by "nodes" and by their place in the "node". The first time, all processes must ask for it.

        UserError unless each node has as many processes.
        """
        return self._nodes[0]

    @functools.cached_property
    def _nodes(self) -> tuple[DeviceMesh, dist.ProcessGroup]:
        """The mesh, and this node's processes as a group of gloo to wait for each other's work."""
        self.wait(where="splitting the weights")
        sizes = [None] * self.size
        dist.all_gather_object(sizes, self.node_size)
        if len(set(sizes)) > 1 or self.node_size < 1 or self.size % self.node_size:
            got = ", ".join(map(str, sorted(set(sizes))))
            raise UserError(f"--shard: expected as many processes on every node, got {got} of {self.size} in all")
        shape = (self.size // self.node_size, self.node_size)
        own, _ = dist.new_subgroups(self.node_size, backend="gloo", timeout=roll.PATIENCE)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("nodes", "node")), own

    def from_node_main(self, value):
        """What the first process of this node calls it with. Waits for all of the node's, for days if need be."""
        (_, node), first = self._nodes, self.rank - self.place_in_node
        roll.gather("sharing out work", group=node, ranks=range(first, first + self.node_size))
        box = [value]
        dist.broadcast_object_list(box, group=node, group_src=0)
        return box[0]

    def __str__(self) -> str:
        """What a run's first line says."""
        kernels = {"triton": ", kernels: Triton", "torch": ", kernels: PyTorch definitions"}.get(self.kernels, "")
        return f"{self.size} process{'es' * (self.size > 1)} on {self.device.type}{kernels}"

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients over all processes: each process has scaled its loss by the global batch already."""
        parameters = list(parameters)
        if self.size > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.grad.copy_(g.view_as(p.grad))

    def sum(self, values: dict[str, Tensor]) -> dict[str, float]:
        """The sum of every value () over all processes, which must hold the same keys; one read of the device."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values.values()])
        if self.size > 1:
            dist.all_reduce(total)
        return dict(zip(values, total.tolist()))

    def meet(self, where: str) -> None:
        """Waits until all processes are here. where: what they meet for, in words.

        Lost names those that do not come within `step_timeout`. Broken if one of them ended; `program` finds out which.
        By gloo on CUDA, too: a process that waits in NCCL can neither be interrupted nor tell whom it waits for, so let
        all be here first.
        """
        if self.size > 1:
            roll.gather(where, self.step_timeout)

    def wait(self, meanwhile: Callable[[], None] = lambda: None, where: str = "the work of all") -> None:
        """Waits until all processes are here, for days if need be, and calls `meanwhile` twice a second.

        Says after 1, 2, 4… minutes who is missing. Broken if one of them ended before, which is noticed at once, on
        any node: its connections close. `program` finds out which.
        """
        if self.size > 1:
            roll.gather(where, meanwhile=meanwhile)


def alone() -> Group:
    """For a command that runs in one process. UserError under torchrun with several, which would all do its work."""
    _, size = rank_and_size()
    if size > 1:
        raise UserError(f"expected one process, got {size}: start this command without torchrun")
    return Group()


def rank_and_size() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many they are. UserError for nonsense."""
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not rank < size:
        raise UserError(f"RANK={rank}: expected less than WORLD_SIZE={size}; {_BY_TORCHRUN}")
    return rank, size


def slow(items: Iterable | None, what: str, unit: str, total: int | None = None) -> tqdm:
    """A bar for work that may take long and has no bar of its own: after a second, on the first process, until it ends.

    items: to go through, or None for who counts in `update`, up to total. what: is done, in words. unit: "B" is bytes.
    """
    look = dict(delay=1, mininterval=1.0, leave=False, dynamic_ncols=True, disable=rank_and_size()[0] > 0)
    return tqdm(items, what, total, unit=unit, unit_scale=unit == "B", **look)


_BY_TORCHRUN = "let torchrun set it, or unset it for a process alone"


def _number(variable: str, default: int) -> int:
    """What torchrun set, an integer ≥ 0."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable}={text}: expected a whole number; {_BY_TORCHRUN}")
    return int(text)


def start_group(
    implementation: Callable[[torch.device], str] | None = None, step_timeout: float = STEP_TIMEOUT
) -> Group:
    """Joins the process group that torchrun describes: NCCL with CUDA, gloo on the CPU. One process needs no group.

    implementation: names the kernels of a device, or raises what is missing there, which becomes a UserError.
    step_timeout: seconds after which a collective fails. `Group.wait` is for what differs by more from one process to
    another: loading, hashing, writing a checkpoint.
    """
    rank, size = rank_and_size()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", _number("LOCAL_RANK", 0)) if cuda else torch.device("cpu")
    if cuda:
        if device.index >= (count := torch.cuda.device_count()):
            raise UserError(f"expected a GPU for each process, got {count}: start torchrun --nproc_per_node {count}")
        torch.cuda.set_device(device)
        # cuBLAS may else add the parts of a long bfloat16 sum in bfloat16, and round more than once
        # (docs.pytorch.org/docs/stable/notes/cuda.html, "Reduced Precision Reduction in BF16 GEMMs")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    elif "OMP_NUM_THREADS" not in os.environ:  # as torchrun does: on shared cores small models take many times as long
        torch.set_num_threads(1)
    if (size > 1 or dist.is_torchelastic_launched()) and not dist.is_initialized():
        try:
            roll.start("nccl" if cuda else "gloo", rank, size, step_timeout)
        except ValueError as error:
            raise UserError(f"expected torchrun to start {size} processes, got: {error}") from None
        except RuntimeError as error:
            raise roll.Lost(f"the {size} processes did not come together: {str(error).splitlines()[0]}") from None
    try:
        return Group(rank, size, device, implementation(device) if implementation else "", step_timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from None


def place(net: nn.Module, cfg, group: Group) -> nn.Module:
    """What --shard and --compile do to a network on its device, with `blocks`, whose frozen parameters are its weights.

    cfg.shard: its weights are split over the processes of a node, with a copy on every node (FSDP2), and a block's are
    gathered while it runs, so all processes of a node must call it as often as each other. Parameters to train stay
    whole: their gradients, checkpoints and results are what they are without. cfg.compile: blocks run through
    torch.compile, each as one graph unless net.prefix. Returns net. UserError for cfg.shard without torchrun.
    """
    if cfg.shard:
        if not dist.is_initialized():
            raise UserError("--shard: expected several processes, got one alone; start it with torchrun")
        whole = {p for p in net.parameters() if p.requires_grad}
        if len(whole) == len(list(net.parameters())):
            raise UserError("--shard: expected frozen weights to split, but all are trained; leave --shard out")
        for part in (*net.blocks, net):
            fully_shard(part, mesh=group.mesh, ignored_params=whole)
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # a continuation's lengths, batches and branches: more than 8
        for block in net.blocks:  # the method, and not the module: FSDP2's hooks around it are not to be compiled
            block.forward = torch.compile(block.forward, fullgraph=not net.prefix)
    return net


def local_batch(cfg, group: Group) -> tuple[int, int]:
    """Samples of the global batch that this process takes, and how many of them a forward takes.

    cfg: batch_size, and micro_batch, of which 0 means all. UserError if they do not divide.
    """
    per_process, rest = divmod(cfg.batch_size, group.size)
    micro = min(cfg.micro_batch or per_process, per_process)
    if rest or micro < 1 or per_process % micro:
        raise UserError(
            f"batch_size {cfg.batch_size}: expected a multiple of {group.size} process(es) "
            f"x micro_batch {cfg.micro_batch or 1}; change --batch_size or --micro_batch"
        )
    return per_process, micro
