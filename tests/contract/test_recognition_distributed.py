"""Recognition on two processes: averaged gradients, the decoder's matrices shared, and an exact
resume."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from base.distributed import World
from models.layers.batchnorm import synchronise_batch_norm
from models.layers.llama import own_part
from models.recognition.decoding import one_shot
from models.recognition.nxtp import IGNORED, Nxtp, NxtpConfig
from models.weights.build_nxtp import NetworkOptions
from runtime.parallel import ParallelOptions, parallelize
from tests.helpers.gradients import assert_same_gradients, distance, gradients_of
from tests.helpers.processes import spawn
from tests.helpers.recognition_runs import arguments, finish, start
from tests.helpers.runs import lines
from tests.helpers.tiny_nxtp import network

IMAGES = 4


def batch() -> dict[str, torch.Tensor]:
    """Four images whose texts have different numbers of targets."""
    torch.manual_seed(5)
    lengths, rows = (9, 6, 12, 5), []
    for length in lengths:
        ids = [30, 1, 5, 6] + torch.randint(10, 30, (length - 4,)).tolist()
        ids[-1] = 9
        rows.append((ids, [0] * 4 + [1] * (length - 4), [*ids[1:], IGNORED]))
    pad = max(lengths)
    columns = [torch.tensor([row[k] + [fill] * (pad - len(row[k])) for row in rows]) for k, fill in
               enumerate((39, -1, IGNORED))]  # fmt: skip
    return {
        "image": torch.randn(IMAGES, 3, 32, 32),
        "ids": columns[0],
        "segments": columns[1],
        "targets": columns[2],
    }


def inputs(whole: dict, part: slice) -> dict[str, torch.Tensor]:
    """The model's batch of some of the images."""
    targets = whole["targets"][part].flatten()
    positions = (targets != IGNORED).nonzero().flatten()
    return {
        "image": whole["image"][part], "text_ids": whole["ids"][part], "segments": whole["segments"][part],
        "positions": positions, "labels": targets[positions],
    }  # fmt: skip


def straight() -> dict[str, torch.Tensor]:
    model = network().train()
    model(**inputs(batch(), slice(None)))["loss_objs"].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients_are_averaged(rank: int) -> None:
    """Through the wrapped model's own call, as the script makes it."""
    expected, world = straight(), World(rank, 2, rank, torch.device("cpu"))
    model = parallelize(network().train(), world, ParallelOptions())
    assert isinstance(model, DistributedDataParallel)
    part = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares: 8 and 20 targets
    model(**inputs(batch(), part))["loss_objs"].backward()
    assert_same_gradients(gradients_of(model.module), expected, 1e-5)
    around = network().train()  # and around it, as the original called it, they are not
    around(**inputs(batch(), part))["loss_objs"].backward()
    name = "language_decoder.output.weight"
    assert distance(gradients_of(around)[name], expected[name]) > 0.1


def test_two_processes_train_as_one():
    spawn(gradients_are_averaged, 2)


def small_resnet() -> Nxtp:
    torch.manual_seed(0)
    return NetworkOptions(decoder=(32, 1), decoder_heads=2, resnet=[8, 1, 1], image_size=32).build(
        Tokens()
    )


class Tokens:
    vocab_size, image = 40, 30


def a_resnet_trains_as_one(rank: int) -> None:
    """Batch norms take their statistics over both processes, as the script asks for."""
    whole, world = small_resnet().train(), World(rank, 2, rank, torch.device("cpu"))
    whole(**inputs(batch(), slice(None)))["loss_objs"].backward()
    model = parallelize(synchronise_batch_norm(small_resnet()), world, ParallelOptions()).train()
    model(**inputs(batch(), slice(2 * rank, 2 * rank + 2)))["loss_objs"].backward()
    assert_same_gradients(gradients_of(model.module), gradients_of(whole), 1e-4)
    running = [network.vision_encoder.bn1.running_var for network in (whole, model.module)]
    assert torch.allclose(*running, atol=1e-6)


def test_a_resnet_on_two_processes():
    spawn(a_resnet_trains_as_one, 2)


def decoder_is_shared(rank: int) -> None:
    from fairscale.nn.model_parallel import initialize_model_parallel

    initialize_model_parallel(2)
    whole = network()
    decoder = replace(whole.config.decoder, tensor_parallel=True)
    shared = Nxtp(NxtpConfig(whole.config.vision, decoder)).eval()
    shared.load_state_dict(own_part(whole.state_dict(), rank, 2))
    mine = sum(p.numel() for p in shared.language_decoder.parameters())
    assert mine < 0.55 * sum(p.numel() for p in whole.language_decoder.parameters())
    one = inputs(batch(), slice(None))
    losses = [model(**one)["loss_objs"] for model in (whole, shared)]
    assert torch.allclose(*losses, atol=1e-5)
    for loss in losses:
        loss.backward()
    expected = own_part({name: p.grad for name, p in whole.named_parameters()}, rank, 2)
    assert_same_gradients(gradients_of(shared), expected, 1e-5)
    with torch.no_grad():
        prompt = torch.tensor([30, 1, 5, 6])
        found = [
            one_shot(model, model.encode_image(one["image"]), prompt, 9, 6)
            for model in (whole, shared)
        ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert torch.allclose(found[0].probabilities, found[1].probabilities, atol=1e-6)


def test_a_decoder_shared_by_two_processes_is_the_same_network():
    spawn(decoder_is_shared, 2)


CHANGES = {"workers": 1, "batch_size": 4, "save_every": "2 steps"}


@pytest.fixture(scope="module")
def on_two(digitscenes, tmp_path_factory):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    finish(2, arguments(digitscenes, folder, **CHANGES))
    return folder


def weights(folder):
    return torch.load(folder / "checkpoint_00000008.pt", weights_only=True)


def test_the_script_takes_the_same_steps_on_two_processes(on_two, digitscenes, tmp_path):
    """Half the batch on each: the same samples, losses, and weights up to the order of sums."""
    start(arguments(digitscenes, tmp_path, workers=1, batch_size=8))
    losses = [
        [line["loss"] for line in lines(folder) if "loss" in line] for folder in (tmp_path, on_two)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    on_one, on_both = weights(tmp_path)["optimizer"]["state"], weights(on_two)["optimizer"]["state"]
    first, second = (
        {name: state["exp_avg"] for name, state in each.items()} for each in (on_one, on_both)
    )
    assert_same_gradients(second, first, 1e-2)  # their running means; AdamW makes small ones large
    for name, value in weights(tmp_path)["model"].items():
        assert torch.allclose(weights(on_two)["model"][name], value, atol=2e-4), name


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_goes_on_exactly(processes, on_two, digitscenes, tmp_path):
    """Stopped in the middle of an epoch; one process in this one, to save its start."""
    straight_run, stopped = (
        on_two if processes == 2 else tmp_path / "straight",
        tmp_path / "stopped",
    )
    runs = [(stopped, {"max_steps": 5}), (stopped, {})]
    for folder, stop in runs if processes == 2 else [(straight_run, {}), *runs]:
        flags = arguments(digitscenes, folder, **CHANGES, **stop)
        start(flags) if processes == 1 else finish(processes, flags)
        assert (folder / "checkpoint_00000005.pt").exists() is bool(stop)
    assert lines(stopped) == lines(straight_run)
    ours, theirs = weights(stopped), weights(straight_run)
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())
    for name, state in theirs["optimizer"]["state"].items():
        assert all(
            torch.equal(ours["optimizer"]["state"][name][key], value)
            for key, value in state.items()
        ), name
    results = [
        (folder / "result/labels_test.json").read_text() for folder in (stopped, straight_run)
    ]
    assert results[0] == results[1]
