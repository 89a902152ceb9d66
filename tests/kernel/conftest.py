"""Fixtures of the kernel tests. They run as root in a kernel that has ESP: `tests/run kernel`, or by hand

    deploy/kernel python3 -m pytest tests/kernel -k NAME

After every test the wire must have been clean, and no outbound key programmed twice since the session began."""

import os
import re
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from keywatch import KeyWatch  # noqa: E402
from rig import Lab  # noqa: E402
from running import measures  # noqa: E402

_watches = []


@pytest.fixture(scope="session")
def keywatch():
    """What every kernel of the session was given."""
    watch = KeyWatch()
    _watches.append(watch)
    yield watch
    watch.close()


@pytest.fixture
def make_lab(request, keywatch):
    """make_lab(count, mtu=1500): a Lab, checked and taken down after the test."""
    labs = []

    def make(count, **options):
        name = f"t{os.getpid() % 100000}-{len(labs)}"
        labs.append(Lab(name, count, keywatch=keywatch, **options))
        return labs[-1]

    request.node.labs = labs
    yield make
    problems = []
    for lab in labs:
        try:
            if lab.wire.allowed is None:
                lab.wire.assert_clean()
        except AssertionError as error:
            problems.append(str(error))
        finally:
            lab.down()
    try:
        keywatch.check()
    except AssertionError as error:
        problems.append(str(error))
        keywatch.faults.clear()  # reported here, once
    assert not problems, "\n".join(problems)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what its nodes said and had."""
    report = (yield).get_result()
    if not report.failed or call.when == "teardown":
        return
    for lab in getattr(item, "labs", []):
        report.sections.append((f"wire of {lab.name}", f"{dict(lab.wire.counts)}"))
        for node in lab.nodes:
            try:
                # The keys of a test are nobody's secret, but a report is no place for them to become a habit.
                state = node.run("ip xfrm state list nokeys; ip xfrm policy; ip route; ip -6 route", check=False).stdout
                log = re.sub(r"\x1b\[[0-9;]*m", "", node.log())
                report.sections.append((f"{node}: log", log[-6000:]))
                report.sections.append((f"{node}: counters", f"{node.xfrm_stat()}"))
                report.sections.append((f"{node}: kernel", state[-6000:]))
            except Exception as error:
                report.sections.append((f"{node}", f"could not be asked: {error}"))


def pytest_sessionstart():
    if os.geteuid() != 0:
        pytest.exit("the kernel tests need root in a kernel with ESP: deploy/kernel python3 -m pytest tests/kernel", 1)


def pytest_terminal_summary(terminalreporter):
    for measure in measures:
        terminalreporter.write_line(f"measured: {measure}")
    for watch in _watches:
        outbound = [one for one in watch.programmed if one.outbound]
        distinct = {one.key for one in outbound}
        terminalreporter.write_line(f"keys: {len(outbound)} outbound SAs programmed, {len(distinct)} distinct keys")
        # The hashes, for whoever compares several sessions.
        if into := os.environ.get("RINGMAIL_TEST_KEYS"):
            with open(into, "a") as file:
                file.writelines(f"{key}\n" for key in sorted(distinct))
