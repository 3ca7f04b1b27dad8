"""stub replaced below."""

from sidecar.runtime import Runtime


def create_management(runtime: Runtime):
    async def app(scope, receive, send): ...

    return app
