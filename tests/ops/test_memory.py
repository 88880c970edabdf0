"""Memory of large maps that is used again: never while a tensor is in it."""
import concurrent.futures
import copy
import gc
import pickle
import weakref

import pytest
import timm
import torch

import san_backbones
from san_backbones import ops
from san_backbones.ops import memory

ONE = torch.empty(())
LARGE = memory.LARGE // ONE.element_size()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('shape', [(2, 3), (1, 512, 512, 16), (0,), (3, LARGE)])
def test_a_map_is_as_new_empty_makes_it(dtype, shape):
    found = ops.Memory().empty(shape, ONE.to(dtype))
    assert found.shape == shape and found.dtype == dtype and found.is_contiguous() and found.data_ptr() % 64 == 0
    assert not found.requires_grad
    assert ops.Memory().empty((LARGE,), ONE.to('meta')).device.type == 'meta'


def test_memory_of_a_map_that_is_gone_is_used_again():
    kept = ops.Memory()
    first = kept.empty((2, LARGE), ONE)
    address = first.data_ptr()
    del first
    second = kept.empty((LARGE + 1,), ONE)  # more than half of it
    assert second.data_ptr() == address and second.untyped_storage().nbytes() == 8 * LARGE
    del second
    assert kept.empty((2, LARGE + 1), ONE).data_ptr() != address  # too small
    assert kept.empty((2, LARGE), ONE).data_ptr() == address
    kept.clear()
    assert not kept._free


@pytest.mark.parametrize('share', [
    lambda x: x, lambda x: x[1:], lambda x: x.permute(1, 0)[..., :1], lambda x: x.view(torch.int32),
    lambda x: x.detach(), lambda x: x.numpy(), lambda x: torch.from_dlpack(x[1:]), lambda x: x.untyped_storage(),
    lambda x: torch.nn.Parameter(x), lambda x: memoryview(x.numpy())])
def test_memory_is_not_used_while_anything_is_in_it(share):
    kept = ops.Memory()
    with torch.inference_mode(False):
        x = kept.empty((2, LARGE), ONE).fill_(1)
        address = x.data_ptr()
        shared = share(x)
    del x
    gc.collect()
    other = kept.empty((2, LARGE), ONE)
    assert other.data_ptr() != address
    del shared
    gc.collect()
    assert kept.empty((2, LARGE), ONE).data_ptr() == address


def test_few_blocks_are_kept_the_latest():
    kept = ops.Memory()
    maps = [kept.empty((LARGE * 3 ** i,), ONE) for i in range(3)] + [kept.empty((LARGE,), ONE) for _ in range(7)]
    addresses = [x.data_ptr() for x in maps]
    while maps:
        del maps[0]
    assert list(kept._free) == addresses[-memory.KEPT:]


def test_maps_outlive_the_memory_and_the_memory_outlives_no_model():
    kept = ops.Memory()
    seen, x = weakref.ref(kept), kept.empty((LARGE,), ONE).fill_(7)
    del kept
    assert (x == 7).all()
    del x
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize('copied', [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_begins_empty(copied):
    kept = ops.Memory()
    kept.empty((LARGE,), ONE)
    assert kept._free and not copied(kept)._free


def test_threads_have_maps_of_their_own():
    kept = ops.Memory()

    def work(number):
        for _ in range(50):
            x = kept.empty((LARGE,), ONE).fill_(number)
            if not (x == number).all():
                return False
        return True
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        assert all(threads.map(work, range(6)))


def test_a_block_that_another_thread_takes_first():
    class Taken(dict):
        def items(self):
            found = list(super().items())
            self.clear()  # by the other thread, before this one
            return found
    kept = ops.Memory()
    address = kept.empty((LARGE,), ONE).data_ptr()
    block = kept._free[address]  # so that nothing else gets its memory
    kept._free = Taken(kept._free)
    assert kept.empty((LARGE,), ONE).data_ptr() != block.data_ptr()


# --- The networks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch, size', [(1, 384), (6, 256)])
@pytest.mark.parametrize('name', ['test_san_pairwise', 'test_san_patchwise'])
def test_features_that_are_kept_stay_what_they_are(name, batch, size):
    """Maps of several MB of one call, beside those of the next."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True).eval()
    images = torch.randn(2, batch, 3, size, size)
    with torch.inference_mode():
        expected = [model(x) for x in images]
        san_backbones.fuse_for_inference(model)
        actual = [model(x) for x in images]
        del actual[0]
        again = model(images[0])
    for x, y in ((again, expected[0]), (actual[0], expected[1])):
        for found, true in zip(x, y):
            torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-4)


def test_the_stages_of_a_model_share_their_memory_and_training_lets_go_of_it():
    model = san_backbones.fuse_for_inference(timm.create_model('test_san_patchwise')).eval()
    kept, = {stage.memory for stage in model.stages}
    assert copy.deepcopy(model).stages[0].memory is not kept
    with torch.inference_mode():
        model(torch.randn(1, 3, 512, 512))
    assert bool(kept._free) == (ops.native.unavailable() is None)
    san_backbones.refold(model)
    assert {stage.memory for stage in model.stages} == {kept}
    model.train()(torch.randn(2, 3, 32, 32))
    assert not kept._free
