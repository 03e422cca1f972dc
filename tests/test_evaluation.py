"""All measures at once."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from reglib.objectives.evaluation import Evaluation, evaluate
from reglib.objectives.metrics import dice, jacobian_statistics, nda, ndv, ssim, tre
from reglib.objectives.surface import assd, hd95

SHAPES = [(16, 20), (12, 14, 11)]


def everything(shape, batch):
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, batch, 1, *shape))
    labels = np.digitize(ndimage.gaussian_filter(noise, (0, 0, 0, *(2,) * len(shape))), [0, 0.1])
    return {
        "labels": tuple(torch.from_numpy(5 * labels)),
        "points": tuple(torch.from_numpy(rng.normal(0, 5, (2, batch, 4, len(shape))))),
        "images": tuple(torch.from_numpy(rng.random((2, batch, 1, *shape)))),
        "field": torch.from_numpy(rng.normal(0, 0.4, (batch, len(shape), *shape))),
        "mask": torch.from_numpy(rng.integers(0, 2, (batch, 1, *shape))),
        "spacing": (0.5, 2.0, 1.5)[: len(shape)],
    }


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_figure_is_that_of_its_function(shape, batch):
    x = everything(shape, batch)
    found = evaluate(**x)
    assert found.labels == (5, 10)
    assert found.dice.equal(dice(*x["labels"], labels=[5, 10]))
    assert found.hd95.equal(hd95(*x["labels"], labels=[5, 10], spacing=x["spacing"]))
    assert found.assd.equal(assd(*x["labels"], labels=[5, 10], spacing=x["spacing"]))
    assert found.tre.equal(tre(*x["points"]))
    warped, fixed = x["images"]
    for i in range(batch):
        reach = (fixed[i].max() - fixed[i].min()).item()
        alone = ssim(warped[i : i + 1], fixed[i : i + 1], data_range=reach)
        assert found.ssim[i : i + 1].equal(alone)
    for ours, expected in zip(
        found.jacobian, jacobian_statistics(x["field"], mask=x["mask"]), strict=True
    ):
        assert ours.equal(expected)
    assert found.ndv.equal((nda if len(shape) == 2 else ndv)(x["field"], mask=x["mask"]))
    assert found.unit == "mm"


@pytest.mark.parametrize("name", ["labels", "points", "images", "field"])
def test_what_is_not_given_is_not_measured(name):
    found = evaluate(**{name: everything((16, 20), 2)[name]})
    measured = {key for key, value in found._asdict().items() if value is not None}
    expected = {
        "labels": {"labels", "dice", "hd95", "assd"},
        "points": {"tre"},
        "images": {"ssim"},
        "field": {"jacobian", "ndv"},
    }
    assert measured == expected[name] | {"unit"}
    assert found.unit == "voxel"
    assert isinstance(found, Evaluation)
    assert len(str(found).splitlines()) == (6 if name == "labels" else 4)


def test_the_table_by_hand():
    found = evaluate(
        labels=(torch.tensor([[[[1, 1, 0, 2]]]]), torch.tensor([[[[0, 1, 1, 2]]]])),
        points=(torch.zeros(1, 3, 2), torch.full((1, 3, 2), 3.0)),
        spacing=(1.0, 0.5),
    )
    assert str(found) == (
        "pair  label  Dice  HD95 [mm]  ASSD [mm]\n"
        "   0      1   0.5        0.5       0.25\n"
        "   0      2     1          0          0\n"
        "mean         0.75       0.25      0.125\n"
        "\n"
        "pair  TRE [mm]\n"
        "   0     4.243"
    )


def test_the_table_says_percent_for_folding():
    shape = (12, 12)
    u = torch.zeros(2, 2, *shape)
    u[1, 0] = -2 * torch.arange(12.0).view(12, 1)
    lines = str(evaluate(field=u)).splitlines()
    assert lines[0].split("  ")[-2:] == ["folding [%]", "NDV [%]"]
    assert lines[1].split()[-2:] == ["0", "0"]
    assert lines[2].split()[-2] == "100"
    assert lines[3].startswith("mean")


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^labels, points, images, field: .* got none$"):
        evaluate()
    with pytest.raises(TypeError, match=r"^points: wanted a pair of tensors, got Tensor$"):
        evaluate(points=torch.zeros(2, 1, 3))
    empty = torch.zeros(1, 1, 6, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"^labels: wanted integers, not all of them 0, got only"):
        evaluate(labels=(empty, empty))
    for bad in (0.5, torch.nan):
        with pytest.raises(ValueError, match=r"^labels: wanted integers, .* got \["):
            evaluate(labels=(empty + bad, empty))
    flat = torch.ones(2, 1, 12, 12)
    with pytest.raises(ValueError, match=r"^fixed: wanted images that are not constant"):
        evaluate(images=(torch.rand(2, 1, 12, 12), flat))
    with pytest.raises(ValueError, match=r"^warped, fixed: wanted the same shape"):
        evaluate(images=(flat, flat[:1]))
    with pytest.raises(ValueError, match=r"^points, field: wanted the same batch size, got "):
        evaluate(points=(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2)), field=torch.zeros(1, 2, 4, 4))
