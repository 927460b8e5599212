"""``python -m tests.scenarios MODULE FUNCTION LOOP LIMIT ARGUMENTS``"""

from __future__ import annotations

import asyncio
import faulthandler
import importlib
import inspect
import json
import sys
from collections.abc import Callable
from typing import Any


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module(name).new_event_loop
    return factory


def main() -> None:
    module, name, loop, limit, arguments = sys.argv[1:]
    faulthandler.dump_traceback_later(float(limit), exit=True)
    scenario = getattr(importlib.import_module(module), name)
    factory, args = loop_factory(loop), json.loads(arguments)
    errors: list[dict[str, Any]] = []
    if inspect.iscoroutinefunction(scenario):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: errors.append(context))
            result = runner.run(scenario(*args))
    else:
        result = scenario(factory, *args)
    if errors:
        raise RuntimeError(
            f"the loop's exception handler was called {len(errors)} times: {errors[:3]}"
        )
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
