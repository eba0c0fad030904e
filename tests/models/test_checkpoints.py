from __future__ import annotations

import pytest
import safetensors.torch
import torch
from torch import nn

from models.checkpoints import fitted, read_checkpoint


class Command:
    """Something that a checkpoint must not be able to bring along."""


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors"])
def test_weights_are_read_from_either_format(tmp_path, name):
    state = {"a.weight": torch.randn(2, 3), "b": torch.arange(4)}
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / name)
    again = read_checkpoint(tmp_path / name)
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


def test_what_could_run_code_or_is_no_file_of_weights_is_refused(tmp_path):
    torch.save({"a": Command()}, tmp_path / "code.pt")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    for name in ("code.pt", "page.safetensors"):
        with pytest.raises(ValueError, match=f"{name} is refused: .*save its state_dict") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_module_without_memory_takes_the_tensors_over():
    state = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    assert fitted(module, state, "file.pt", assign=True) is module
    assert module.weight.data_ptr() == state["weight"].data_ptr() and module.weight.requires_grad


def test_every_kind_of_misfit_is_named_in_one_line():
    with pytest.raises(ValueError, match=r"^file.pt does not fit Linear: 1 missing \(bias\), 4 not known \(a, b, c, \.\.\.\), "
                                         r"1 of another shape \(weight\); do this$"):
        fitted(nn.Linear(2, 3), dict.fromkeys("abcd", torch.zeros(1)) | {"weight": torch.zeros(2, 3)}, "file.pt", "do this")
