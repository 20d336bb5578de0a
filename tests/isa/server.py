"""The kernels of a machine, compiled without torch into a program that this one talks to, emulated where it must be."""

import struct
import subprocess

import torch

from fastens import _build

ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WITHOUT_TORCH = ("scratch.cpp", "forest/layout.cpp", "forest/predict.cpp", "forest/workers.cpp")  # of csrc/cpu


def compiled(cxx, folder, machine_flags=()):
    """The server as ``cxx`` compiles it, in ``folder``, where a later call finds its objects again."""
    root = _build.source_root()
    once = [path for path in _build.sources() if path.is_relative_to(root / "isa")]
    once += [root / "cpu" / name for name in WITHOUT_TORCH]
    once.append(root.parent / "tests" / "isa" / "server.cpp")
    objects = {f"once-{path.stem}.o": (path, []) for path in once} | _build.kernel_objects(cxx)
    flags = [flag for flag in _build.compile_flags() if flag != "-fPIC"]
    lines = [
        f"cflags = {' '.join([*flags, *machine_flags, f'-I{root}'])}",
        "rule compile",
        f"  command = {cxx} -MMD -MF $out.d $cflags $own -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -static -pthread $in -o $out",
    ]
    for name, (source, own) in objects.items():
        lines += [f"build {name}: compile {source}", f"  own = {' '.join(own)}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join([*lines, f"build server: link {' '.join(objects)}", ""]))
    result = subprocess.run([_build.ninja(), "-C", str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "server"


def data_of(tensor):
    """A tensor's numbers as bytes."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def memory_of(tensor):
    """All that lies between a tensor's first element and its last."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span if tensor.numel() else 0,), (1,))


def sized(data):
    """Bytes behind their number."""
    return struct.pack("<q", len(data)) + data


class Server:
    """The program behind its pipe; every method is one request."""

    def __init__(self, command, environment):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def close(self):
        """End it."""
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0

    def ask(self, *parts):
        """Send words, floats and bytes."""
        formats = {int: "<q", float: "<d"}
        self.process.stdin.write(
            b"".join(p if isinstance(p, bytes) else struct.pack(formats[type(p)], p) for p in parts)
        )
        self.process.stdin.flush()

    def take(self, size):
        """So many bytes of the answer."""
        data = self.process.stdout.read(size)
        assert len(data) == size, f"the server ended with {self.process.poll()}"
        return bytearray(data)

    def taken_like(self, tensor, size=None):
        """A tensor of the answer."""
        shape = tensor.shape if size is None else size
        count = int(torch.Size(shape).numel())
        if count == 0:
            return torch.empty(shape, dtype=tensor.dtype)
        return torch.frombuffer(self.take(count * tensor.element_size()), dtype=tensor.dtype).reshape(shape)

    def described(self):
        """The instruction set, and why it is no better one."""
        self.ask(0)
        return self.take(struct.unpack("<q", self.take(8))[0]).decode()

    def run_program(self, program, weights, arena, inputs, outputs, num_threads):
        """As :func:`fastens.ops.run_program.run_program`."""
        slots = [memory_of(slot) for slot in (arena, weights, *inputs, *outputs)]
        self.ask(1, sized(data_of(program)), len(slots), *(sized(data_of(slot)) for slot in slots))
        for slot in slots:
            slot.copy_(self.taken_like(slot))

    def aggregate(self, rule, scores, average=True, scale=1.0, eps=0.0, weights=()):
        """One of linear, median, dominant, max_abs, geometric, variance by its number; the batch is one sample."""
        element, held = ELEMENTS[scores[0].dtype], torch.tensor(weights or [1.0] * len(scores), dtype=torch.float64)
        self.ask(2, rule, element, len(scores), int(average), scale, eps, sized(data_of(held)))
        self.ask(*(sized(data_of(score)) for score in scores))
        return self.taken_like(scores[0])

    def dropout(self, x, members, samples, p, key, evaluation, activation):
        """As :func:`fastens.reference.dropout.dropout`, ``activation`` by its number."""
        self.ask(3, ELEMENTS[x.dtype], activation, x.shape[0], x[0].numel(), key, evaluation, p)
        self.ask(*(sized(data_of(t)) for t in (x, members, samples)))
        return self.taken_like(x)

    def predict(self, trees, double_inputs, x, rule):
        """What a forest's trees [K, n, p] are combined to by a rule; x: float64 [n, features]."""
        arrays = (
            trees.offsets,
            trees.feature,
            trees.threshold,
            trees.left,
            trees.right,
            trees.default_left,
            trees.values,
        )
        leaves, outputs = trees.values.shape
        sizes = (len(trees.offsets) - 1, trees.num_features, outputs, len(trees.feature), leaves)
        self.ask(4, *sizes, int(double_inputs), len(x), len(rule.values))
        self.ask(*(sized(array.tobytes()) for array in (*arrays, x)))
        self.ask(sized(rule.name.encode()), sized(rule.option.encode()))
        self.ask(sized(struct.pack(f"<{len(rule.values)}d", *rule.values)))
        return self.taken_like(torch.empty(0, dtype=torch.float64), (len(x), outputs)).numpy()
