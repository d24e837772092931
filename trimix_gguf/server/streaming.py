"""Responses that come in parts."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.responses import Response
from starlette.types import Receive, Scope, Send


class Stream(Response):
    """A response in parts that come one by one; it ends if a client reads none for `stall_s`."""

    def __init__(
        self, first: bytes, rest: AsyncGenerator[bytes, None], *, media_type: str, stall_s: float
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._first, self._rest, self._stall_s = first, rest, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(part: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": part, "more_body": more})

        start = {"type": "http.response.start", "status": self.status_code}
        with suppress(TimeoutError):  # uvicorn hangs up where a response ends too early
            async with aclosing(self._rest) as rest:
                await send({**start, "headers": self.raw_headers})
                await tell(self._first)
                async for part in rest:
                    await tell(part)
            await tell(b"", more=False)
