"""What reaches a request, whenever it looks."""

import asyncio

from jaxldm.serving.mailbox import Mailbox
from jaxldm.serving.orders import Accepted, Failed, Picture, Progress


async def all_of(events):
    return [event async for event in events]


def test_what_came_at_once_is_not_lost():
    """The order was accepted, drawn and refused further before anybody looked."""

    async def talk(*events):
        mailbox = Mailbox(2)
        for event in events:
            mailbox.put(event)
        await asyncio.sleep(0)
        first = await asyncio.wait_for(mailbox.accepted(), 5)
        return first, await asyncio.wait_for(all_of(mailbox.events()), 5)

    pictures = [Picture(image, b"", 4) for image in range(2)]
    assert asyncio.run(talk(Accepted(), *pictures)) == (None, pictures)
    failed = Failed("server_error", "x")
    assert asyncio.run(talk(Accepted(), pictures[0], failed)) == (None, [pictures[0], failed])


def test_a_refusal_comes_in_place_of_the_acceptance():
    async def talk():
        mailbox = Mailbox(1)
        mailbox.put(Failed("invalid_request", "x"))
        return await asyncio.wait_for(mailbox.accepted(), 5)

    assert asyncio.run(talk()) == Failed("invalid_request", "x")


def test_of_progress_the_latest_is_kept():
    async def talk():
        mailbox = Mailbox(1)
        mailbox.put(Accepted())
        assert await mailbox.accepted() is None
        for step in range(1000):
            mailbox.put(Progress(0, step, 1000))
        mailbox.put(Picture(0, b"", 1))
        await asyncio.sleep(0.01)
        return await asyncio.wait_for(all_of(mailbox.events()), 5)

    assert asyncio.run(talk()) == [Progress(0, 999, 1000), Picture(0, b"", 1)]
