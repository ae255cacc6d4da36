"""An unpickler of bounded memory and time, whose subclasses decide what a pickle may build.

A pickle acts only through the names it looks up (`find_class`). But with no name at all, nine bytes
can ask for gigabytes (a memo index), and a few hundred can hash for ever (a tuple of two references
to a tuple of two references ... as the key of a dictionary). `BoundedUnpickler` is Python's own
unpickler in Python, with what each opcode allocates, hashes and copies charged to the limits of
`base.limits`.
"""

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from base.limits import (
    EQUAL_HASHES,
    INTEGER_BYTES,
    KEY_WORK,
    PICKLE_FLOOR,
    PICKLE_RATIO,
    PICKLE_VALUES,
    TUPLE_LEVELS,
    TUPLE_VALUES,
    check_limit,
)

REMEDY = "have its owner export the data as JSON or safetensors"
ATOMS = (str, bytes, int, float, bool, type(None))
CONTAINERS = (list, tuple, dict, set, frozenset)
# bytes of memory charged: about what CPython takes
MARK, OBJECT, ENTRY, ITEM, MEMO, CALL, SET = 150, 64, 100, 16, 100, 500, 220


class BoundedUnpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Reads one pickle out of a file whose `read(n)` never returns or allocates more than is there.

    file: a BytesIO or a mmap; name: the file in messages; size: its bytes, which the memory limit
    grows with. Raises UserError where a limit is passed, whatever pickle raises for a damaged one.
    """

    dispatch: ClassVar[dict] = {}  # by opcode, filled below

    def __init__(self, file: Any, name: object, size: int, encoding: str = "utf-8"):
        super().__init__(file, encoding=encoding)
        self.name = name
        self.limit = PICKLE_FLOOR + PICKLE_RATIO * size
        self.left = self.limit
        self.work = KEY_WORK
        self.nested: dict[int, tuple[int, int, Any]] = {}  # id -> (values, levels, the tuple)
        self.hashes: Counter = Counter()  # (container, hash of a key) -> keys
        self.shares = False  # whether a container is referred to twice

    def load(self) -> Any:
        """The object. Containers that refer to themselves, or that stand for too many values, are
        refused by `check_size`, which callers apply to what they make of it."""
        try:
            return super().load()
        except (KeyError, IndexError) as error:  # no such opcode, or an empty stack
            raise pickle.UnpicklingError(f"not a pickle ({type(error).__name__})") from None
        finally:
            self.memo.clear()

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is not a harmless name")

    def container(self, module: str, name: str) -> Callable | None:
        """What makes a standard container; None for other names."""
        makers = {
            ("builtins", "set"): self.make_set,
            ("builtins", "frozenset"): self.make_frozenset,
            ("collections", "OrderedDict"): self.make_ordered,
            ("collections", "Counter"): self.make_dict,
            ("collections", "defaultdict"): _empty_dict,
        }
        return makers.get((module, name))

    # ---- charges
    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise UserError(
                f"{self.name}: its pickle asks for more than {self.limit:,} bytes of memory, the "
                f"limit for a file of its size; {REMEDY}"
            )

    def spend_on(self, values: Iterable) -> None:
        """Charges what a call may copy of its arguments."""
        total = CALL
        for value in values:
            if isinstance(value, str | bytes | bytearray):
                total += 4 * len(value)
            elif isinstance(value, list | tuple | dict | set | frozenset):
                total += ENTRY * len(value)
        self.spend(total)

    def check_key(self, container: object, key: Any) -> None:
        """Charges what it takes to hash a key; hashes that were made to collide are refused."""
        kind = type(key)
        if kind is str or kind is bytes or (kind is int and -(2**63) <= key < 2**63):
            return
        self.work -= 1 + self.values_of(key)[0]
        if self.work < 0:
            raise UserError(
                f"{self.name}: more than {KEY_WORK:,} values to hash, the limit; {REMEDY}"
            )
        if kind in (float, bool, type(None)):
            return
        self.spend(2 * ENTRY)
        place = (id(container), hash(key))
        self.hashes[place] += 1
        if self.hashes[place] > EQUAL_HASHES:
            raise UserError(
                f"{self.name}: more than {EQUAL_HASHES:,} keys of one hash, the limit; {REMEDY}"
            )

    def values_of(self, value: Any) -> tuple[int, int]:
        """Values that a key stands for, written out, and how deep they nest."""
        if isinstance(value, tuple | frozenset):
            return self.nested[id(value)][:2] if id(value) in self.nested else (len(value), 1)
        return (1 + value.bit_length() // 64 if isinstance(value, int) else 1, 0)

    def made(self, value: tuple | frozenset) -> Any:
        """A new tuple or frozenset, measured."""
        self.spend(OBJECT + 8 * len(value))
        inner = [self.values_of(each) for each in value if isinstance(each, tuple | frozenset)]
        if inner:
            values = len(value) + sum(each for each, _ in inner)
            levels = 1 + max(level for _, level in inner)
            if values > TUPLE_VALUES or levels > TUPLE_LEVELS:
                raise UserError(
                    f"{self.name}: a tuple that stands for more than {TUPLE_VALUES:,} values or "
                    f"nests deeper than {TUPLE_LEVELS}, the limits; {REMEDY}"
                )
            self.nested[id(value)] = (values, levels, value)  # kept alive, so that the id stays
        return value

    # ---- containers that are called by name
    def make_set(self, items: Iterable = ()) -> set:
        made: set = set()
        self.add_to(made, list(items))
        return made

    def make_frozenset(self, items: Iterable = ()) -> frozenset:
        return self.made(frozenset(self.make_set(items)))

    def make_dict(self, items: Any = ()) -> dict:
        made: dict = {}
        self.fill(made, items.items() if isinstance(items, dict) else items)
        return made

    def make_ordered(self, items: Any = ()) -> OrderedDict:
        made: OrderedDict = OrderedDict()
        self.fill(made, items.items() if isinstance(items, dict) else items)
        return made

    def fill(self, target: Any, pairs: Iterable) -> None:
        for key, value in pairs:
            self.spend(ENTRY)
            self.check_key(target, key)
            target[key] = value

    def add_to(self, target: set, items: list) -> None:
        self.spend(ENTRY * len(items))
        for item in items:
            self.check_key(target, item)
            target.add(item)

    # ---- opcodes
    def load_mark(self):
        self.spend(MARK)
        self.metastack.append(self.stack)
        self.stack = []
        self.append = self.stack.append

    def load_empty_list(self):
        self.spend(OBJECT)
        self.append([])

    def load_empty_dictionary(self):
        self.spend(OBJECT)
        self.append({})

    def load_empty_set(self):
        self.spend(SET)
        self.append(set())

    def load_tuple(self):
        items = self.pop_mark()  # changes self.append
        self.append(self.made(tuple(items)))

    def load_tuple1(self):
        self.stack[-1:] = [self.made(tuple(self.stack[-1:]))]

    def load_tuple2(self):
        self.stack[-2:] = [self.made(tuple(self.stack[-2:]))]

    def load_tuple3(self):
        self.stack[-3:] = [self.made(tuple(self.stack[-3:]))]

    def load_frozenset(self):
        items = self.pop_mark()
        self.append(self.make_frozenset(items))

    def load_dict(self):
        items = self.pop_mark()
        made: dict = {}
        self.fill(made, zip(items[::2], items[1::2], strict=True))
        self.append(made)

    def load_append(self):
        value = self.stack.pop()
        self.extend(self.stack[-1], [value])

    def load_appends(self):
        items = self.pop_mark()
        self.extend(self.stack[-1], items)

    def extend(self, target: Any, items: list) -> None:
        self.spend(ITEM * len(items))
        target.extend(items)

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self.fill(self.stack[-1], [(key, value)])

    def load_setitems(self):
        items = self.pop_mark()
        self.fill(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_additems(self):
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            raise pickle.UnpicklingError("items for what is no set")
        self.add_to(self.stack[-1], items)

    def load_reduce(self):
        arguments = self.stack.pop()
        self.spend_on(arguments)
        self.stack[-1] = self.stack[-1](*arguments)

    def load_newobj(self):
        arguments = self.stack.pop()
        self.spend_on(arguments)
        kind = self.stack.pop()
        self.append(kind.__new__(kind, *arguments))

    def load_newobj_ex(self):
        if self.stack.pop():
            raise pickle.UnpicklingError("keyword arguments")
        self.load_newobj()

    def _instantiate(self, kind, arguments):
        self.spend_on(arguments)
        self.append(kind(*arguments))

    def load_build(self):
        state = self.stack.pop()
        self.spend_on(state if isinstance(state, tuple) else [state])
        made = self.stack[-1]
        if type(made) is OrderedDict:
            return  # the _metadata of a state dict
        if not hasattr(type(made), "__setstate__"):
            raise pickle.UnpicklingError(f"the pickle tries to change a {type(made).__name__}")
        made.__setstate__(state)

    def load_long4(self):
        count = int.from_bytes(self.read(4), "little", signed=True)
        if not 0 <= count <= INTEGER_BYTES:
            raise UserError(
                f"{self.name}: an integer of {count:,} bytes, the limit is {INTEGER_BYTES}; {REMEDY}"
            )
        self.append(pickle.decode_long(self.read(count)))

    def load_bytearray8(self):
        count = int.from_bytes(self.read(8), "little")
        data = self.read(min(count, self.limit))
        if len(data) < count:
            raise EOFError("the file ends inside a bytearray")
        self.append(bytearray(data))

    def get_extension(self, code):
        raise pickle.UnpicklingError("the pickle asks for a registered extension")

    def remember(self, index: int) -> None:
        if index not in self.memo:
            self.spend(MEMO)
        self.memo[index] = self.stack[-1]

    def load_put(self):
        self.remember(int(self.readline()[:12]))

    def load_binput(self):
        self.remember(self.read(1)[0])

    def load_long_binput(self):
        self.remember(int.from_bytes(self.read(4), "little"))

    def load_memoize(self):
        self.remember(len(self.memo))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise pickle.UnpicklingError(f"no memo value at index {index}")
        value = self.memo[index]
        self.shares = self.shares or not isinstance(value, ATOMS)
        self.append(value)

    def load_get(self):
        self.recall(int(self.readline()[:12]))

    def load_binget(self):
        self.recall(self.read(1)[0])

    def load_long_binget(self):
        self.recall(int.from_bytes(self.read(4), "little"))

    def load_dup(self):
        self.shares = True
        self.append(self.stack[-1])


# pickle finds the function of an opcode in this table: those of its methods that are redefined above
for _code, _function in pickle._Unpickler.dispatch.items():  # type: ignore[attr-defined]
    BoundedUnpickler.dispatch[_code] = getattr(BoundedUnpickler, _function.__name__)


def _empty_dict(*_factory: object) -> dict:
    return {}


def check_size(value: Any, name: object) -> None:
    """UserError where shared containers stand for too many values, or one contains itself: whoever
    walks through them would never come to an end."""
    if not _is_container(value):
        return
    sizes: dict[int, int] = {}  # by container: its values written out; 0 while inside it
    written = 0  # values that are really there
    stack = [(value, False)]
    while stack:
        node, inside = stack.pop()
        key = id(node)
        if inside:
            values = 1 + sum(sizes.get(id(each), 1) for each in _children(node))
            sizes[key] = min(values, 1 << 62)
        elif key not in sizes:
            sizes[key] = 0
            children = _children(node)
            written += 1 + len(children)
            _check_tensors(children, name)
            stack.append((node, True))
            stack.extend((each, False) for each in children if _is_container(each))
        elif not sizes[key]:
            raise UserError(f"{name}: a container in it contains itself; {REMEDY}")
    if sizes[id(value)] > PICKLE_VALUES + written:
        raise UserError(
            f"{name}: its containers stand for more than {PICKLE_VALUES:,} values, the limit; "
            f"{REMEDY}"
        )


def _is_container(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype.hasobject
    return isinstance(value, CONTAINERS)


def _check_tensors(values: list, name: object) -> None:
    """Refuses views that repeat a few bytes a billion times: the first copy would fill memory."""
    for value in values:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            there = value.untyped_storage().nbytes()
            check_limit(name, value.nbytes, there + PICKLE_FLOOR, "bytes in an expanded tensor")


def _children(node: Any) -> list:
    if isinstance(node, dict):
        return [*node.keys(), *node.values()]
    return list(node.flat) if isinstance(node, np.ndarray) else list(node)
