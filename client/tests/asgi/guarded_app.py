"""The application of FastAPI behind keyproxy in the tests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, WebSocket

from keyproxy_client.asgi import IdentityMiddleware
from keyproxy_client.fastapi import identity, needs
from keyproxy_client.identity import Identity, Trust
from wsgi_app import shown


def asgi_app(trust: Trust) -> FastAPI:
    """The application of FastAPI."""
    app = FastAPI()
    app.add_middleware(IdentityMiddleware, trust=trust)

    @app.get("/open")
    async def open_route(request: Request) -> dict[str, Any]:
        names = [name for name in request.headers if "keyproxy" in name.lower()]
        return {"identity": shown(request.state.identity), "names": names}

    @app.get("/me")
    async def me(caller: Annotated[Identity, Depends(identity)]) -> dict[str, Any]:
        return {"identity": shown(caller)}

    @app.post("/jobs")
    async def jobs(caller: Annotated[Identity, Depends(needs("jobs:write"))]) -> dict[str, Any]:
        return {"identity": shown(caller)}

    @app.get("/purge", dependencies=[Depends(needs("jobs:purge"))])
    async def purge() -> None:
        """Nothing."""

    @app.websocket("/ws")
    async def ws(socket: WebSocket, caller: Annotated[Identity, Depends(identity)]) -> None:
        await socket.accept()
        await socket.send_text(caller.user)
        await socket.close()

    return app
