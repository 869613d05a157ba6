import torch

from fastprune.decoding.memory import BatchMemory


def test_memory_is_used_again_only_when_no_view_of_it_is_left():
    memory = BatchMemory()
    first = memory.take((4, 8), torch.float32)
    address, view = first.data_ptr(), first[2:]
    del first
    second = memory.take((4, 8), torch.float32)
    assert second.data_ptr() != address
    del view
    assert memory.take((2, 8), torch.float32).data_ptr() == address


def test_an_array_made_of_a_tensor_keeps_its_memory():
    memory = BatchMemory()
    array = memory.take((16,), torch.uint8).fill_(7).numpy()
    memory.take((16,), torch.uint8).fill_(9)
    assert (array == 7).all()


def test_the_tensor_has_the_shape_and_type_that_are_asked_for():
    tensor = BatchMemory().take((2, 3, 5), torch.bfloat16)
    assert tensor.shape == (2, 3, 5)
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()


def test_an_empty_tensor_needs_no_memory():
    assert BatchMemory().take((0, 3), torch.float32).shape == (0, 3)
