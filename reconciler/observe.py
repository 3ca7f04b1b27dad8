"""Ask the nodes: one run of the observing play, one round trip per node, a second chance for silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from reconciler import requests, runner
from reconciler.model import NodeState, Observation, Observed, Resource, ResourceId

PLAYBOOK = "observe.yml"
NO_RESULT = "Ansible gave no result for it"


class Observer:
    """Looks at nodes through Ansible. ``on_node`` is told of every node as it answers."""

    def __init__(
        self,
        settings: runner.Settings,
        variables: Mapping[str, Mapping[str, Any]],
        on_run: Callable[[str, int], None],
        on_node: Callable[[NodeState], None],
        ahead: runner.Workspace | None = None,
    ) -> None:
        self.settings, self.variables = settings, variables
        self.on_run, self.on_node = on_run, on_node
        self._ahead = ahead
        self._fence: tuple[int, Callable[[], None]] | None = None

    def start_ahead(self) -> None:
        """Let Ansible start now for a look that is going to be wanted soon; ends with :meth:`close`."""
        if self._ahead is None:
            self._ahead = runner.Workspace()
            self._ahead.start_ahead(PLAYBOOK, self.settings)

    def close(self) -> None:
        """End what was started ahead and not wanted."""
        if self._ahead is not None:
            self._ahead.__exit__()
            self._ahead = None

    def fence(self, epoch: int, done: Callable[[], None]) -> None:
        """Let the next look tell every node of ``epoch``, so that it refuses a controller that was taken over."""
        self._fence = (epoch, done)

    def observe(self, resources: Iterable[Resource], *, fresh: bool = False) -> Observed:
        """Facts of the resources. A node that stays silent is asked a second time before it counts as unknown."""
        wanted: dict[str, list[Resource]] = {}
        for resource in resources:
            wanted.setdefault(resource.id.node, []).append(resource)
        seen = self._ask(wanted, fresh=fresh)
        silent = {name: wanted[name] for name, state in seen.nodes.items() if not state.reachable}
        if silent:
            seen = seen.merged(self._ask(silent, fresh=True))
        for state in seen.nodes.values():
            self.on_node(state)
        if self._fence:
            self._fence[1]()
            self._fence = None
        return seen

    def _ask(self, wanted: Mapping[str, list[Resource]], *, fresh: bool) -> Observed:
        if not wanted:
            return Observed({}, {})
        groups: dict[str, list[list[Resource]]] = {}
        answers: dict[str, list[dict[str, Any]]] = {}

        def on_result(result: runner.Result) -> None:
            if "reconciler" in result.data:
                answers[result.node] = result.data["reconciler"]["batches"]
                state = _state(result.node, answers[result.node])
                if state.reachable:
                    self.on_node(state)
            elif result.status != "ok":
                answers[result.node] = [{"error": _first_line(result.data.get("msg")), "reached": False}]

        privileged = False
        ahead, self._ahead = self._ahead, None
        with ahead or runner.Workspace() as workspace:
            for name, resources in wanted.items():
                epoch = self._fence[0] if self._fence else None
                request, groups[name] = requests.looks(
                    resources, self.variables[name], fresh=fresh, epoch=epoch
                )
                privileged |= any(batch["become"] for batch in request["batches"])
                workspace.request(name, request)
            self.on_run(PLAYBOOK, len(wanted))
            more = {"become": privileged, "one_each": True}
            runner.run(PLAYBOOK, list(wanted), workspace, self.settings, on_result, **more)
        nodes: dict[str, NodeState] = {}
        observations: dict[ResourceId, Observation] = {}
        for name, batches in groups.items():
            answer = answers.get(name) or [{"error": NO_RESULT, "reached": False}]
            nodes[name] = _state(name, answer)
            observations |= _observations(batches, answer)
        return Observed(nodes, observations)


def _first_line(text: Any) -> str:
    lines = str(text or "").strip().splitlines()
    return lines[0] if lines else "no reason given"


def _state(name: str, answers: list[dict[str, Any]]) -> NodeState:
    """How the conversation with one node went, over all its batches."""
    errors = [answer for answer in answers if "error" in answer]
    transport = next((a["connection"]["transport"] for a in answers if "connection" in a), "")
    total = sum(answer.get("seconds", 0.0) for answer in answers)
    if errors and not any(error.get("reached") for error in errors):
        return NodeState(name, reachable=False, reason=errors[0]["error"])
    reason = errors[0]["error"] if errors else ""
    return NodeState(name, reachable=True, reason=reason, transport=transport, seconds=round(total, 3))


def _observations(
    batches: list[list[Resource]], answers: list[dict[str, Any]]
) -> dict[ResourceId, Observation]:
    """Facts or the reason why there are none, for every resource that was asked for."""
    found = {}
    for index, group in enumerate(batches):
        answer = answers[index] if index < len(answers) else answers[-1]
        probes = answer.get("answer", {}).get("probes")
        for position, resource in enumerate(group):
            said = probes[position] if probes else {"error": answer.get("error", NO_RESULT)}
            found[resource.id] = Observation(resource.id, said.get("facts"), said.get("error", ""))
    return found
