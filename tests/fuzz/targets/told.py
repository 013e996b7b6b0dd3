"""What people, programs and replicas say: words, files on a command line, Slurm, clusters, members, states."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import re
import socket
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.membership import secret, store_server
from dtrain.comm.runtime.membership.elastic import Unfit
from dtrain.comm.runtime.membership.elastic_rounds import ElasticRounds
from dtrain.comm.runtime.membership.members import Epoch, Members, serve
from dtrain.comm.runtime.membership.sealed_messages import MAC, Mistrust, Sealed, _seal
from dtrain.comm.runtime.membership.store_server import StoreServer
from dtrain.comm.runtime.method import Sync
from dtrain.compress import error_feedback, quantize, topk
from dtrain.errors import ConfigError
from dtrain.launchers import background, mpi
from dtrain.launchers.job import State
from dtrain.launchers.slurm import client, refusal
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.slurm.devcluster import state
from dtrain.testing.replicas import Replicas
from dtrain.train.config import files, words
from dtrain.train.config.words import Kind
from tests.fuzz.harness import Case, Target
from tests.fuzz.typed import require_typed

KINDS: tuple[Kind, ...] = ("value", "text", "optional text", "texts", "unknown")
WORDS = (
    b"train.steps=50", b"run.dir='a=b'", b"model={_target_:x.Y,dim:[1,2,{a:null}]}", b"~data.path", b"+a.b@c=1e-3",
    b"launcher.environment=[A=1,\"B=2\"]", b"lr=interval(0,1)", b"sync=choice(diloco,dense)", b"x=${train.steps}",
)  # fmt: skip


def word(folder: Path) -> Case:
    """A word of the command line, for a key of every kind."""

    def read(data: bytes) -> object:
        found, refused = [], None
        for kind in KINDS:
            try:
                found.append(words.value_of(words.read(os.fsdecode(data)), kind, None))
            except ConfigError as error:
                refused = error
        if not found and refused is not None:
            raise refused
        return found

    return Case(WORDS[0], read, (ConfigError,), lambda found, intact: None, others=WORDS, extra=WORDS)


def file_of_words(folder: Path) -> Case:
    """What ``dtrain train @exp.yaml`` names."""
    path = folder / "exp.yaml"
    text = b"sync: diloco\ntrain: {steps: 50, lr: 1e-3}\ntrain.seed: 2\nmodel: {_target_: x.Y, n: 3}\ndata.path: text\n"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return files.words_of(str(path))

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list) and all(isinstance(one, words.Word) for one in found)
        assert not intact or [one.key for one in found] == [
            "sync", "train.steps", "train.lr", "train.seed", "model", "data.path",
        ]  # fmt: skip

    return Case(text, read, (ConfigError,), check)


# ---- Slurm, mpirun, clusters ---------------------------------------------------------------------------------------


def _answering(data: bytes) -> None:
    """From now on all of Slurm's commands say this, as `ask` would hand it on."""
    for module in (client, refusal):
        module.__dict__["ask"] = lambda *command, **_: data.decode(errors="replace")


def job_states(folder: Path) -> Case:
    """The state of a job, as squeue, scontrol and sacct say it."""

    def read(data: bytes) -> object:
        _answering(data)
        return client.job_state("12"), client.job_record("12")

    def check(found: object, intact: bool) -> None:
        state, record = cast("tuple[str, dict[str, str]]", found)
        assert state in typing.get_args(State) and all(isinstance(value, str) for value in record.values())

    return Case(b"RUNNING\n", read, (), check, others=(b"JobId=12 JobState=PENDING Reason=None\n", b"CANCELLED+\n"))


def partitions(folder: Path) -> Case:
    """What sinfo says, and what is made of it before a job is submitted."""
    settings = SlurmLauncher(nodes=2, workers=4, threads_per_worker=8, partition="main")

    def read(data: bytes) -> object:
        _answering(data)
        return refusal.problems(settings, folder, one_machine=True)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list) and all(isinstance(one, str) for one in found)

    return Case(b"main*|4|1-00:00:00|up\ndebug|2K|infinite|up\n", read, (), check, others=(b"main*|4|16\nx|1|64+\n",))


def refused(folder: Path) -> Case:
    """What sbatch says when it does not take a job."""
    settings = SlurmLauncher(constraint="a100", sbatch=("--nice=5",))
    text = b"sbatch: error: Batch job submission failed: Invalid feature specification\n"

    def read(data: bytes) -> object:
        said = data.decode(errors="replace")
        return refusal.unanswered(said), refusal.refusal_message(said, settings)

    def check(found: object, intact: bool) -> None:
        words = cast("tuple[bool, str]", found)[1]
        assert "--constraint" in words if intact else re.search(r"come(s)? from launcher\.", words)

    return Case(text, read, (), check)


def nodes(folder: Path) -> Case:
    """SLURM_JOB_NODELIST."""

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, tuple) and len(found) <= mpi.MOST_NODES
        assert not intact or found == ("gpu08", "gpu09", "gpu10", "gpu12x1", "gpu12x2", "login1")

    return Case(
        b"gpu[08-10],gpu[12]x[1-2],login1",
        lambda data: mpi.nodes_of_slurm({"SLURM_JOB_NODELIST": data.decode(errors="replace")}),
        (ValueError,), check, extra=(b"a[1-999999999]", b"[0-9]" * 60, b"x" * 100_000, b"a[9-1]"),
    )  # fmt: skip


def cluster(folder: Path) -> Case:
    """What is known of a cluster of `dtrain cluster`."""
    state.ROOT = folder
    (folder / "dev").mkdir()
    facts = state.Facts("dev", ("c1",), {"c1": "10.0.0.1", "login": "10.0.0.9"}, {"c1": 7}, {"c1": 10, "login": None})
    facts.write()
    path = folder / "dev" / "cluster.json"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        state.running()
        return state.Facts.read("dev")

    def check(found: object, intact: bool) -> None:
        require_typed(found)
        assert not intact or found == facts

    return Case(path.read_bytes(), read, (OSError, ValueError), check, json=True)


def background_job(folder: Path) -> Case:
    """What the process of a job without a scheduler is to run."""
    launcher = background.MpiLauncher(workers=2, hosts=("a:1", "b:1"), environment=("A=1",))
    settings = vars(launcher)
    path = folder / "background.json"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return background.stored("mpi", path)

    def check(found: object, intact: bool) -> None:
        launcher, program = cast("tuple[background.MpiLauncher, tuple[str, ...]]", found)
        require_typed(launcher)
        assert all(isinstance(part, str) for part in program) and program

    intact = json.dumps({"settings": settings, "program": ["python", "t.py"]}).encode()
    return Case(intact, read, (ValueError,), check, json=True)


# ---- members -------------------------------------------------------------------------------------------------------


def epoch(folder: Path) -> Case:
    """Who is in a run whose replicas come and go, as the store keeps it."""
    first = Epoch(3, {0: 0, 2: 1}, 0, (2,))

    def check(found: object, intact: bool) -> None:
        require_typed(found)
        assert not intact or found == first

    return Case(first.to_json().encode(), Epoch.from_json, (ValueError,), check, json=True)


@dataclass
class _Said:
    """A connection on whose other end somebody says ``left``, and hears what is answered."""

    left: bytes
    heard: bytes = b""

    def recv(self, most: int) -> bytes:
        part, self.left = self.left[:most], self.left[most:]
        return part

    def sendall(self, data: bytes) -> None:
        self.heard += data


def _sealed(said: _Said, key: bytes = b"k" * 32) -> Sealed:
    return Sealed(cast(socket.socket, said), (key, key))


def _text(*fields: bytes) -> bytes:
    said = _Said(b"")
    _sealed(said).send(*fields)
    return said.heard


def message(folder: Path) -> Case:
    """A sealed message: what was sent, or refused."""
    fields, other = [b"set", b"epoch/3", b"value" * 9], [b"look", b"a"]

    def check(found: object, intact: bool) -> None:
        assert found in (fields, other)

    def read(data: bytes) -> object:
        return _sealed(_Said(data)).receive()

    return Case(_text(*fields), read, (Mistrust, EOFError), check, others=(_text(*other),))


def request(folder: Path) -> Case:
    """What one who knows the secret asks of the store: each message is answered, and the store goes on."""
    store_server.WAIT_SECONDS = 0.01
    server = StoreServer("127.0.0.1", 0, b"s" * 32)

    def sealed(text: bytes) -> bytes:
        return len(text).to_bytes(4, "big") + _seal(b"k" * 32, 0, text) + text

    def read(data: bytes) -> object:
        said = _Said(sealed(data))
        with contextlib.suppress(EOFError):  # it has said all
            server._answer(_sealed(said))
        probe = _Said(_text(b"check", b"nothing"))
        with contextlib.suppress(EOFError):
            server._answer(_sealed(probe))
        return _sealed(_Said(said.heard)).receive() if said.heard else [], _sealed(_Said(probe.heard)).receive()

    def check(found: object, intact: bool) -> None:
        answer, after = cast("tuple[list[bytes], list[bytes]]", found)
        assert after == [b"ok", b"no"] and (not answer or answer[0] in (b"ok", b"error"))
        assert not intact or answer == [b"ok"]

    def plain(*fields: bytes) -> bytes:
        return _text(*fields)[4 + MAC :]

    others = (
        plain(b"add", b"n", b"3"), plain(b"compare_set", b"a", b"", b"b"), plain(b"under", b"e"), plain(b"look", b"a"),
        plain(b"wait", b"5", b"a"), plain(b"delete", b"a"), plain(b"count"), plain(b"check", b"a", b"b"),
    )  # fmt: skip
    return Case(plain(b"set", b"epoch/3", b"value"), read, (), check, others=others, extra=others)


def secret_file(folder: Path) -> Case:
    path = folder / "secret"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        path.chmod(0o600)
        return secret.read_secret(path)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, bytes) and len(found) >= 16

    return Case(b"0123456789abcdef" * 4 + b"\n", read, (ValueError,), check)


def handed_over(folder: Path) -> Case:
    """The state that a replica gets from another when it comes into a run."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    os.environ[secret.VALUE] = "s" * 32
    store = serve(0, "127.0.0.1")
    model = DistributedDataParallel(nn.Linear(2, 2))
    sync = attach(
        model, torch.optim.SGD(model.parameters(), lr=0.1), diloco(every_steps=2),
        members=Members(f"127.0.0.1:{store.port}", replicas=1),
    )  # fmt: skip
    loop = sync.method
    assert isinstance(loop, LocalUpdateLoop)
    rounds = loop.meeting
    assert isinstance(rounds, ElasticRounds)
    gc.disable()  # the store lives as long as this process

    def kept() -> list[object]:
        return [
            (fqn, name, tensor.tolist()) for fqn, named in sync.state.tensors.items() for name, tensor in named.items()
        ]

    intact = rounds.packed(loop).numpy().tobytes()
    rounds.unpack(loop, rounds.packed(loop), 0)
    expected = [*kept(), rounds.membership.position, sync.numbers]

    def read(data: bytes) -> object:
        try:
            rounds.unpack(loop, torch.frombuffer(bytearray(data or b"x"), dtype=torch.uint8), 0)
        finally:
            assert [*kept(), rounds.membership.position, sync.numbers] == expected, "something else was loaded"
        return None

    return Case(intact, read, (Unfit,), lambda found, intact: None)


# ---- a sync's state ------------------------------------------------------------------------------------------------


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype)[6:], "shape": [*value.shape], "values": value.flatten().tolist()}
    if isinstance(value, Mapping) or hasattr(value, "keys"):
        mapping = cast("Mapping[str, object]", value)
        return {key: _plain(mapping[key]) for key in mapping.keys()}  # noqa: SIM118  # Entries is no Mapping
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _state(value: object) -> object:
    if isinstance(value, dict) and {*value} == {"dtype", "shape", "values"}:
        try:
            return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError):
            return value
    if isinstance(value, dict):
        return {key: _state(one) for key, one in value.items()}
    return [_state(one) for one in value] if isinstance(value, list) else value


def sync_state(spec: Sync, folder: Path) -> Case:
    """The state of a sync whose structure is damaged: loaded whole, or refused, and then nothing has changed."""
    replicas = Replicas(spec, 1, start={"w": torch.arange(6.0), "b": torch.ones(3)})
    replicas.train(5)
    attached = replicas.attached[0]

    def shapes() -> object:
        return {
            fqn: {name: (tensor.shape, tensor.dtype) for name, tensor in named.items()}
            for fqn, named in attached.state.tensors.items()
        }

    def flat(found: object) -> list[object]:
        kept = cast("dict[str, dict[str, object]]", found)
        return [(fqn, name, shape) for fqn, named in kept.items() for name, shape in named.items()]

    whole = shapes()

    def read(data: bytes) -> object:
        before, counters = attached.state.tensors, attached.numbers
        found = json.loads(data, parse_int=lambda digits: int(digits[:40]))
        try:
            attached.load_state_dict(cast("dict[str, object]", _state(found)))
        except (TypeError, ValueError) as error:
            if type(error) is TypeError and "state of a sync is" not in str(error):
                raise AssertionError("no error of ours") from error
            assert attached.state.tensors is before and attached.numbers == counters, "half of it was loaded"
            raise
        return shapes()

    def check(found: object, intact: bool) -> None:
        # What a state lacks together with its entry in the list of what it holds cannot be missed.
        assert {*flat(found)} <= {*flat(whole)} and (not intact or found == whole)
        assert all(type(value) in (int, float) for value in attached.numbers.values())

    intact = json.dumps(_plain(attached.state_dict())).encode()
    return Case(intact, read, (TypeError, ValueError, RecursionError), check, json=True)


SYNCS: dict[str, Sync] = {
    "feedback": every_step(compress=error_feedback(topk(0.5))),
    "diloco": diloco(every_steps=4, compress=error_feedback(quantize(bits=8, block=16))),
}

TARGETS = (
    Target("words", word),
    Target("@exp.yaml", file_of_words),
    Target("slurm: job state", job_states),
    Target("slurm: sinfo", partitions),
    Target("slurm: sbatch refuses", refused),
    Target("slurm: node list", nodes),
    Target("cluster.json", cluster),
    Target("background.json", background_job),
    Target("members: epoch", epoch),
    Target("members: message", message),
    Target("members: request", request),
    Target("members: secret", secret_file),
    Target("members: state handed over", handed_over),
    *(Target(f"state of a sync: {name}", functools.partial(sync_state, spec)) for name, spec in SYNCS.items()),
)
