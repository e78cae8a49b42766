import threading

import pytest
import torch

from isomorphic.errors import UserError
from isomorphic.skeletons import shape_copy


def test_a_model_that_cannot_be_copied_is_one_line():
    model = torch.nn.Linear(2, 2)
    vars(model)["lock"] = threading.Lock()
    with pytest.raises(UserError, match="the model cannot be copied: cannot pickle"):
        shape_copy(model)


def test_a_shape_copy_holds_no_data_and_keeps_ties():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    skeleton = shape_copy(model)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert skeleton.get_parameter("0.weight") is skeleton.get_parameter("1.weight")
    assert [p.requires_grad for p in skeleton.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [b.dtype for b in skeleton.buffers()] == [b.dtype for b in model.buffers()]
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
