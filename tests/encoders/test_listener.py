"""BlockListener: which calls of an encoder it records when other code makes them."""

import asyncio
import gc
import threading

import pytest
import torch
from test_capture import assert_same, expected, make_encoder, make_inputs

from s2sent_kernels.capture import BlockCapture, BlockListener, _thread

NOTHING = "no call of the encoder was heard"


def test_it_hears_the_last_call_once():
    encoder = make_encoder()
    listener = BlockListener(encoder, [1, 3])
    with pytest.raises(RuntimeError, match=NOTHING):
        listener.take()
    with torch.no_grad():
        for seed in (0, 1):
            encoder(**make_inputs(seed=seed))
        heard = listener.take()
    with pytest.raises(RuntimeError, match=NOTHING):
        listener.take()
    listener.remove()
    assert_same(heard, expected(encoder, make_inputs(seed=1), [1, 3]))
    encoder(**make_inputs())
    with pytest.raises(RuntimeError, match=NOTHING):
        listener.take()


def test_it_hears_nothing_of_a_captures_own_run():
    encoder = make_encoder()
    wanted = expected(encoder, make_inputs())
    listener = BlockListener(encoder)
    with BlockCapture(encoder) as capture, torch.no_grad():
        assert_same(capture.collect(**make_inputs()), wanted)
        with pytest.raises(RuntimeError, match=NOTHING):
            listener.take()
        encoder(**make_inputs())
        assert_same(listener.take(), wanted)


def test_a_failed_call_leaves_nothing():
    encoder = make_encoder()
    listener = BlockListener(encoder)
    encoder(**make_inputs())
    with pytest.raises(IndexError):
        encoder(input_ids=torch.tensor([[10**6]]))
    assert _thread.calls == []
    with pytest.raises(RuntimeError, match=NOTHING):
        listener.take()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
@pytest.mark.parametrize("place", [0, 2])
def test_an_interrupted_call_ends_with_the_interrupt(kind, place):
    """torch runs no hook after these: the next call of this encoder, and of any other, finds the thread as it was."""

    def stop(*_):
        raise kind

    encoder, other = make_encoder(), make_encoder("bert")
    wanted, others = expected(encoder, make_inputs(seed=1)), expected(other, make_inputs(seed=2))
    listener, another = BlockListener(encoder), BlockListener(other)
    for next_one, ear, seed, states in ((encoder, listener, 1, wanted), (other, another, 2, others)):
        hook = listener.capture._modules[place].register_forward_pre_hook(stop)
        with pytest.raises(kind):
            encoder(**make_inputs())
        hook.remove()
        with torch.no_grad():
            next_one(**make_inputs(seed=seed))
            assert_same(ear.take(), states)
    with BlockCapture(encoder) as capture, torch.no_grad():
        hook = capture._modules[place].register_forward_pre_hook(stop)
        with pytest.raises(kind):
            capture.collect(**make_inputs())
        hook.remove()
        assert _thread.calls == []


def test_threads_hear_their_own_calls():
    encoder, results = make_encoder(), {}
    listener, barrier = BlockListener(encoder), threading.Barrier(2, timeout=60)

    def work(seed):
        with torch.no_grad():
            encoder(**make_inputs(seed=seed))
            barrier.wait()
            results[seed] = listener.take()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listener.remove()
    for seed in (0, 1):
        assert_same(results[seed], expected(encoder, make_inputs(seed=seed)))


def test_what_nobody_took_goes_with_the_listener():
    gc.collect()
    before = len(_thread.heard)
    encoder = make_encoder()
    listener = BlockListener(encoder)
    encoder(**make_inputs())
    assert len(_thread.heard) == before + 1
    del listener, encoder
    gc.collect()
    assert len(_thread.heard) == before


def test_two_listeners_on_one_module_hear_the_same_call():
    encoder = make_encoder()
    listeners = [BlockListener(encoder, [1, 3]), BlockListener(encoder, [0])]
    other = make_encoder()
    third = BlockListener(other)
    wanted = [expected(encoder, make_inputs(), [1, 3]), expected(encoder, make_inputs(), [0])]
    for _ in range(2):
        encoder(**make_inputs())
        for listener, states in zip(listeners, wanted, strict=True):
            assert listener.heard
            assert_same(listener.take(), states)
            assert not listener.heard
    with pytest.raises(IndexError):
        encoder(input_ids=torch.tensor([[10**6]]))
    assert _thread.calls == [] and not any(listener.heard for listener in listeners)
    with BlockCapture(encoder) as capture:
        capture.collect(**make_inputs())
    assert not any(listener.heard for listener in listeners)
    encoder(**make_inputs())
    listeners[0].forget()
    assert [listener.heard for listener in (*listeners, third)] == [False, True, False]
    listeners[0].remove()
    encoder(**make_inputs())
    assert_same(listeners[1].take(), wanted[1])
