"""Small projects, each of which uses a widely used plug-in for its purpose.

The first 40 have the highest rank among the packages made for tests that register a plug-in with pytest
(``docs/reference/plugins.md`` names the list). Left out of these ranks:

- general libraries that bring a plug-in along: typeguard, langsmith, ddtrace, logfire, jaxtyping and others;
- pytest-runner, which is no plug-in of pytest; pytest-playwright and seleniumbase, which need a browser;
- pytest-postgresql, which needs a database server;
- pytest-homeassistant-custom-component, which needs Home Assistant;
- pytest-forked, whose version 1.7.5 fails every test with pytest 9.2, natively as well.

Below them come plug-ins of lower rank that keep files or state, which machines do not share.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A plug-in's project.

    Args:
        plugin: The plug-in's package.
        uses: What of the plug-in the project uses, in Markdown.
        load: The entry points of the plug-in, and of plug-ins that it needs.
        files: The project's files by path; ``test_it.py`` alone needs no path if it is a string.
        runs: The arguments of each run of pytest, one after another in the same project.
        statuses: The exit statuses of the native runs.
        prints: Fragments that the last run must print.
        varies: Patterns of files whose content changes from run to run.
        caches: Patterns of files that only make the next run faster, and do not count.
        needs: Packages that the project needs besides.
        note: A few words for the table.
    """

    plugin: str
    uses: str
    load: tuple[str, ...]
    files: Mapping[str, str] | str
    runs: tuple[str, ...] = ("",)
    statuses: tuple[int, ...] = (0,)
    prints: tuple[str, ...] = ()
    varies: tuple[str, ...] = ()
    caches: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that announce a difference of this plug-in: its own, and the options used."""
        words = (word.partition("=")[0] for run in self.runs for word in run.split())
        return (self.plugin, *(word for word in words if word.startswith("--")))

    def write(self, folder: Path) -> None:
        """Write the project into a new folder."""
        files = {"test_it.py": self.files} if isinstance(self.files, str) else self.files
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text).lstrip("\n"))


SAMPLES = (
    Sample(
        "anyio",
        "marker `anyio`, an async fixture, two event loops",
        ("anyio",),
        """
        import anyio
        import pytest

        pytestmark = pytest.mark.anyio

        @pytest.fixture
        async def number(anyio_backend):
            await anyio.sleep(0)
            yield 1

        async def test_sleeps(number):
            await anyio.sleep(0.01)
            assert number == 1

        async def test_times_out():
            with pytest.raises(TimeoutError):
                with anyio.fail_after(0.01):
                    await anyio.sleep_forever()
        """,
        needs=("trio",),
    ),
    Sample(
        "pytest-cov",
        "`--cov`, a report in the terminal and `coverage.xml`",
        ("pytest_cov",),
        {
            "shop.py": """
                def price(count):
                    if count > 9:
                        return count * 2
                    return count * 3
                """,
            "test_it.py": """
                import shop

                def test_few():
                    assert shop.price(1) == 3

                def test_none():
                    assert shop.price(0) == 0
                """,
        },
        ("--cov=shop --cov-report=term-missing --cov-report=xml",),
        prints=("shop.py       4      1    75%   3",),
        varies=("coverage.xml", ".coverage"),
    ),
    Sample(
        "pytest-asyncio",
        "`asyncio_mode = auto`, an async fixture, a failing test",
        ("asyncio",),
        {
            "pytest.ini": """
                [pytest]
                asyncio_mode = auto
                asyncio_default_fixture_loop_scope = function
                """,
            "test_it.py": """
                import asyncio
                import pytest

                @pytest.fixture
                async def task():
                    task = asyncio.create_task(asyncio.sleep(0.01, "slept"))
                    yield task
                    await task

                async def test_awaits(task):
                    assert await task == "slept"

                async def test_fails():
                    assert await asyncio.sleep(0, 1) == 2
                """,
        },
        statuses=(1,),
        prints=("asyncio: mode=",),
    ),
    Sample(
        "pytest-json-ctrf",
        "`--ctrf`",
        ("ctrf",),
        """
        def test_passes():
            pass

        def test_fails():
            assert [1] == [2]
        """,
        ("--ctrf=ctrf.json",),
        statuses=(1,),
        varies=("ctrf.json",),
    ),
    Sample(
        "pytest-xdist",
        "`-n 2`, fixture `worker_id`",
        ("xdist",),
        """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_each(number, worker_id):
            assert worker_id in {"gw0", "gw1"}
            assert number < 3
        """,
        ("-n 2",),
        statuses=(1,),
        note="`worker_id` is `master` in every machine",
    ),
    Sample(
        "pytest-mock",
        "fixture `mocker`: patch, spy",
        ("pytest_mock",),
        """
        import os

        def test_patch(mocker):
            mocker.patch("os.getcwd", return_value="/somewhere")
            assert os.getcwd() == "/somewhere"

        def test_patch_is_undone():
            assert os.getcwd() != "/somewhere"

        def test_spy(mocker):
            spy = mocker.spy(os.path, "join")
            os.path.join("a", "b")
            spy.assert_called_once_with("a", "c")
        """,
        statuses=(1,),
        prints=("Actual: join('a', 'b')",),
    ),
    Sample(
        "faker",
        "fixture `faker` with its seed",
        ("faker",),
        """
        def test_name(faker, record_property):
            record_property("name", faker.name())

        def test_seeded_again(faker, record_property):
            record_property("name", faker.name())
        """,
    ),
    Sample(
        "pytest-timeout",
        "marker and option `timeout`",
        ("timeout",),
        """
        import time
        import pytest

        @pytest.mark.timeout(1)
        def test_hangs():
            time.sleep(60)

        def test_is_fast():
            pass
        """,
        ("--timeout=30",),
        statuses=(1,),
        prints=("timeout: 30.0s", "Timeout (>1.0s) from pytest-timeout"),
    ),
    Sample(
        "pytest-rerunfailures",
        "`--reruns`, marker `flaky`",
        ("rerunfailures",),
        """
        import pytest

        seen = []

        def test_second_try():
            seen.append(1)
            assert len(seen) == 2

        @pytest.mark.flaky(reruns=1)
        def test_never():
            assert 0
        """,
        ("--reruns=2 -rR",),
        statuses=(1,),
        prints=("RERUN test_it.py::test_second_try", "2 rerun"),
    ),
    Sample(
        "hypothesis",
        "`@given`, a falsifying example, which the second run tries first",
        ("hypothesispytest",),
        """
        from hypothesis import given, strategies

        tried = []

        @given(strategies.integers(), strategies.integers())
        def test_holds(a, b):
            assert a + b == b + a

        @given(strategies.integers(min_value=0, max_value=10**9))
        def test_falsified(a):
            tried.append(a)
            assert a < 1000, f"first {tried[0]}"
        """,
        ("", ""),
        statuses=(1, 1),
        prints=("Failing test case: test_falsified(", "a=1000", "AssertionError: first 1000"),
        caches=(".hypothesis/*/*", ".hypothesis/*/*/*", ".hypothesis/.gitignore"),
    ),
    Sample(
        "pytest-metadata",
        "`--metadata`, fixture `metadata`",
        ("metadata",),
        """
        def test_metadata(metadata, record_property):
            assert metadata["build"] == "42"
            record_property("keys", sorted(metadata))
        """,
        ("--metadata build 42 --verbose",),
        prints=("metadata: {", "'build': '42'"),
    ),
    Sample(
        "time-machine",
        "fixture and marker `time_machine`",
        ("time_machine",),
        """
        import datetime
        import time

        def test_travels(time_machine):
            time_machine.move_to(datetime.datetime(1985, 10, 26, tzinfo=datetime.timezone.utc), tick=False)
            assert time.time() == 499132800

        def test_is_back():
            assert datetime.date.today().year > 2000
        """,
    ),
    Sample(
        "requests-mock",
        "fixture `requests_mock`",
        ("requests_mock",),
        """
        import pytest
        import requests
        import requests_mock as library

        def test_answer(requests_mock):
            requests_mock.get("http://a.example/", text="data")
            assert requests.get("http://a.example/").text == "data"

        def test_no_answer(requests_mock):
            with pytest.raises(library.exceptions.NoMockAddress):
                requests.get("http://b.example/")
        """,
        needs=("requests",),
    ),
    Sample(
        "pytest-html",
        "`--html`, fixture `extras`",
        ("html", "html_fixtures", "metadata"),
        """
        import pytest_html

        def test_extra(extras):
            print("printed")
            extras.append(pytest_html.extras.text("more", name="note"))

        def test_fails():
            assert [1] == [2]
        """,
        ("--html=report.html",),
        statuses=(1,),
        prints=("Generated html report: file://",),
        varies=("report.html",),
    ),
    Sample(
        "pytest-env",
        "variables in `pytest.ini`",
        ("env",),
        {
            "pytest.ini": """
                [pytest]
                env =
                    SERVER=a.example
                    D:HOME=/nowhere
                """,
            "test_it.py": """
                import os

                def test_variable():
                    assert os.environ["SERVER"] == "a.example"

                def test_default():
                    assert os.environ["HOME"] != "/nowhere"
                """,
        },
    ),
    Sample(
        "pytest-django",
        "`--ds`, marker `django_db`, fixtures `client` and `settings`",
        ("django",),
        {
            "site_settings.py": """
                DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
                INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes"]
                ROOT_URLCONF = "urls"
                SECRET_KEY = "of tests"
                USE_TZ = True
                """,
            "urls.py": """
                from django.http import HttpResponse
                from django.urls import path

                urlpatterns = [path("", lambda request: HttpResponse("hello"))]
                """,
            "test_it.py": """
                import pytest
                from django.contrib.auth.models import Permission

                @pytest.mark.django_db
                def test_user(django_user_model):
                    django_user_model.objects.create_user("ada")
                    assert django_user_model.objects.count() == 1

                @pytest.mark.django_db
                def test_database_is_empty_again(django_user_model):
                    assert django_user_model.objects.count() == 0

                def test_client(client, settings):
                    settings.DEBUG = True
                    assert client.get("/").content == b"hello"

                def test_forbidden():
                    Permission.objects.count()
                """,
        },
        ("--ds=site_settings",),
        statuses=(1,),
        prints=("django: version", "Database access not allowed"),
        needs=("django",),
    ),
    Sample(
        "respx",
        "fixture `respx_mock`",
        ("respx",),
        """
        import httpx
        import pytest

        def test_answer(respx_mock):
            respx_mock.get("http://a.example/").respond(204)
            assert httpx.get("http://a.example/").status_code == 204

        @pytest.mark.respx(assert_all_called=True, base_url="http://a.example")
        def test_route_not_called(respx_mock):
            respx_mock.get("/")
        """,
        statuses=(1,),
        prints=("some routes were not called",),
        needs=("httpx",),
    ),
    Sample(
        "pytest-split",
        "`--store-durations`, then `--splits 2 --group 1`",
        ("pytest-split",),
        """
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_each(number):
            pass
        """,
        ("--store-durations --durations-path=durations.json", "--splits 2 --group 1"),
        statuses=(0, 0),
        prints=("[pytest-split]", "2 passed"),
        varies=("durations.json",),
    ),
    Sample(
        "pytest-benchmark",
        "fixture `benchmark`, `--benchmark-json`",
        ("benchmark",),
        """
        def test_sum(benchmark):
            assert benchmark(sum, range(10)) == 45
        """,
        ("--benchmark-json=benchmark.json --benchmark-max-time=0.1",),
        prints=("benchmark: 1 tests", "test_sum"),
        varies=("benchmark.json",),
        note="no summary and no JSON file without `--microvm-isolation=session`",
    ),
    Sample(
        "pytest-json-report",
        "`--json-report`, fixture `json_metadata`",
        ("pytest_jsonreport", "metadata"),
        """
        def test_metadata(json_metadata):
            json_metadata["answer"] = "yes"

        def test_fails():
            print("printed")
            assert [1] == [2]
        """,
        ("--json-report --json-report-file=report.json",),
        statuses=(1,),
        prints=("report saved to: report.json",),
        varies=("report.json",),
        note="the file lacks `json_metadata`, output and log of tests",
    ),
    Sample(
        "pytest-repeat",
        "`--count`, marker `repeat`",
        ("repeat",),
        """
        import pytest

        def test_by_option():
            pass

        @pytest.mark.repeat(2)
        def test_by_marker():
            assert 0
        """,
        ("--count=3",),
        statuses=(1,),
        prints=("test_by_marker[2-2]", "2 failed, 3 passed"),
    ),
    Sample(
        "pytest-socket",
        "`--disable-socket`, marker `enable_socket`",
        ("socket",),
        """
        import socket
        import pytest

        def test_refused():
            with pytest.raises(RuntimeError, match="socket.socket"):
                socket.socket()

        @pytest.mark.enable_socket
        def test_allowed():
            with socket.socket() as own:
                own.bind(("127.0.0.1", 0))

        def test_fails():
            socket.create_connection(("127.0.0.1", 9))
        """,
        ("--disable-socket",),
        statuses=(1,),
        prints=("SocketBlockedError",),
    ),
    Sample(
        "pytest-unordered",
        "`unordered()` and its explanation",
        ("unordered",),
        """
        from pytest_unordered import unordered

        def test_equal():
            assert [1, 2] == unordered([2, 1])

        def test_unequal():
            assert [1, 2] == unordered([2, 3])
        """,
        statuses=(1,),
        prints=("One item replaced",),
    ),
    Sample(
        "syrupy",
        "`--snapshot-update`, then a comparison with the snapshots",
        ("syrupy",),
        """
        def test_one(snapshot):
            assert {"a": 1} == snapshot

        def test_two(snapshot):
            assert [1, 2] == snapshot
        """,
        ("--snapshot-update", ""),
        statuses=(0, 0),
        prints=("2 snapshots passed",),
    ),
    Sample(
        "pytest-base-url",
        "`--base-url`, fixture `base_url`",
        ("base_url",),
        """
        def test_url(base_url):
            assert base_url == "http://a.example"
        """,
        ("--base-url=http://a.example",),
        prints=("baseurl: http://a.example",),
    ),
    Sample(
        "pytest-custom-exit-code",
        "`--suppress-tests-failed-exit-code`",
        ("custom_exit_code",),
        """
        def test_fails():
            assert 0
        """,
        ("--suppress-tests-failed-exit-code",),
        prints=("1 failed",),
    ),
    Sample(
        "pytest-icdiff",
        "its explanation of a failed comparison",
        ("icdiff",),
        """
        def test_dictionaries():
            assert {"a": 1, "b": [1, 2]} == {"a": 1, "b": [1, 3]}
        """,
        statuses=(1,),
        prints=("equals failed",),
    ),
    Sample(
        "pytest-order",
        "marker `order`, absolute and relative",
        ("pytest_order",),
        """
        import pytest

        @pytest.mark.order(3)
        def test_c():
            pass

        @pytest.mark.order(1)
        def test_a():
            pass

        @pytest.mark.order(after="test_a")
        def test_b():
            pass
        """,
    ),
    Sample(
        "pytest-httpx",
        "fixture `httpx_mock`",
        ("pytest_httpx",),
        """
        import httpx

        def test_answer(httpx_mock):
            httpx_mock.add_response(json={"a": 1})
            assert httpx.get("http://a.example/").json() == {"a": 1}

        def test_not_requested(httpx_mock):
            httpx_mock.add_response(url="http://b.example/")
        """,
        statuses=(1,),
        prints=("The following responses are mocked but not requested",),
    ),
    Sample(
        "pytest-instafail",
        "`--instafail`",
        ("instafail",),
        """
        def test_fails():
            assert [1] == [2]

        def test_passes():
            pass
        """,
        ("--instafail -v",),
        statuses=(1,),
        prints=("test_it.py:2: AssertionError\n\ntest_it.py::test_passes PASSED",),
    ),
    Sample(
        "allure-pytest",
        "`--alluredir`, steps, attachments, severity",
        ("allure_pytest",),
        """
        import allure

        @allure.severity(allure.severity_level.CRITICAL)
        def test_steps():
            with allure.step("step one"):
                allure.attach("attached", name="note", attachment_type=allure.attachment_type.TEXT)

        def test_fails():
            assert [1] == [2]
        """,
        ("--alluredir=allure",),
        statuses=(1,),
        varies=("allure/*.json",),
    ),
    Sample(
        "pytest-randomly",
        "`--randomly-seed`: order of tests, seed of `random`",
        ("randomly",),
        """
        import random
        import pytest

        @pytest.mark.parametrize("number", range(6))
        def test_each(number, record_property):
            record_property("random", random.random())
        """,
        ("--randomly-seed=7",),
        prints=("Using --randomly-seed=7",),
    ),
    Sample(
        "pytest-sugar",
        "`--force-sugar`: its progress bar and failures at once",
        ("sugar",),
        """
        def test_fails():
            assert [1] == [2]

        def test_passes():
            pass
        """,
        ("--force-sugar",),
        statuses=(1,),
        prints=("Results (", "1 passed", "100% ██████████"),
    ),
    Sample(
        "pytest-recording",
        "marker `vcr`, `--record-mode=once`, then a replay without the server",
        ("recording",),
        {
            "server.py": """
                import contextlib
                import http.server
                import threading


                @contextlib.contextmanager
                def running():
                    server = http.server.HTTPServer(("127.0.0.1", 8765), Greeting)
                    threading.Thread(target=server.serve_forever).start()
                    yield
                    server.shutdown()
                    server.server_close()


                class Greeting(http.server.BaseHTTPRequestHandler):
                    def do_GET(self):
                        self.send_response(200)
                        self.end_headers()
                        self.wfile.write(b"hello")
                """,
            "test_it.py": """
                import contextlib
                import pathlib
                import pytest
                import requests
                import server

                @pytest.mark.vcr
                def test_greeting():
                    recorded = pathlib.Path("cassettes/test_it/test_greeting.yaml").exists()
                    with contextlib.nullcontext() if recorded else server.running():
                        assert requests.get("http://127.0.0.1:8765/").text == "hello"
                """,
        },
        ("--record-mode=once", "--record-mode=none"),
        statuses=(0, 0),
        varies=("cassettes/**/*.yaml",),
        needs=("requests",),
        note="the cassettes need `--microvm-write-back='cassettes/'`",
    ),
    Sample(
        "pyfakefs",
        "fixture `fs`",
        ("fakefs",),
        """
        from pathlib import Path

        def test_fake(fs):
            fs.create_file("/etc/app.conf", contents="version = 1")
            assert Path("/etc/app.conf").read_text() == "version = 1"
            assert not Path("/etc/passwd").exists()

        def test_real():
            assert not Path("/etc/app.conf").exists()
            assert Path("/etc/passwd").exists()
        """,
    ),
    Sample(
        "pytest-aiohttp",
        "fixture `aiohttp_client`: a server and its client",
        ("aiohttp", "asyncio"),
        {
            "pytest.ini": """
                [pytest]
                asyncio_mode = auto
                asyncio_default_fixture_loop_scope = function
                """,
            "test_it.py": """
                from aiohttp import web

                async def greet(request):
                    return web.Response(text="hello")

                async def test_greeting(aiohttp_client):
                    app = web.Application()
                    app.router.add_get("/", greet)
                    client = await aiohttp_client(app)
                    answer = await client.get("/")
                    assert await answer.text() == "hello"
                """,
        },
    ),
    Sample(
        "pytest-dotenv",
        "`env_files` in `pytest.ini`, `--envfile`",
        ("dotenv",),
        {
            "pytest.ini": """
                [pytest]
                env_files = test.env
                """,
            "test.env": "SERVER=a.example\n",
            "more.env": "PORT=80\n",
            "test_it.py": """
                import os

                def test_both():
                    assert os.environ["SERVER"] == "a.example"
                    assert os.environ["PORT"] == "80"
                """,
        },
        ("--envfile=more.env",),
    ),
    Sample(
        "pytest-subtests",
        "fixture `subtests`, `unittest`'s `subTest`",
        ("subtests",),
        """
        import unittest

        def test_fixture(subtests):
            for number in range(3):
                with subtests.test("each", number=number):
                    assert number != 1

        class TestCase(unittest.TestCase):
            def test_sub(self):
                for number in range(2):
                    with self.subTest(number=number):
                        self.assertEqual(number, 0)
        """,
        statuses=(1,),
        note="pytest 9 has this fixture itself and does not load the plug-in",
    ),
    Sample(
        "pytest-ordering",
        "markers `first`, `last` and `run`",
        ("pytest_ordering",),
        """
        import pytest

        @pytest.mark.last
        def test_c():
            pass

        @pytest.mark.run(order=2)
        def test_b():
            pass

        @pytest.mark.first
        def test_a():
            pass
        """,
    ),
    # Of lower rank:
    Sample(
        "flaky",
        "`--force-flaky`, decorator `@flaky`",
        ("flaky",),
        """
        from flaky import flaky

        seen = []

        @flaky(max_runs=3)
        def test_second_try():
            seen.append(1)
            assert len(seen) == 2

        def test_never():
            assert 0
        """,
        ("--force-flaky --max-runs=2",),
        statuses=(1,),
        prints=("===Flaky Test Report===", "test_second_try passed 1 out of the required 1 times"),
    ),
    Sample(
        "pytest-codspeed",
        "`--codspeed`, fixture `benchmark`",
        ("codspeed",),
        """
        def test_sum(benchmark):
            assert benchmark(sum, range(10)) == 45
        """,
        ("--codspeed --codspeed-mode=walltime --codspeed-max-rounds=5",),
        varies=(".codspeed/*",),
        prints=("codspeed: ",),
        note="its results are of this computer, which runs no test",
    ),
    Sample(
        "pytest-check",
        "`check`: several failures in one test",
        ("check",),
        """
        from pytest_check import check

        def test_two_failures():
            check.equal(1, 2)
            check.is_in(3, [4])
        """,
        statuses=(1,),
        prints=("Failed Checks: 2",),
    ),
    Sample(
        "pytest-httpserver",
        "fixture `httpserver`",
        ("pytest_httpserver",),
        """
        import urllib.request

        def test_answer(httpserver):
            httpserver.expect_request("/").respond_with_data("hello")
            with urllib.request.urlopen(httpserver.url_for("/")) as answer:
                assert answer.read() == b"hello"
        """,
    ),
    Sample(
        "pytest-testmon",
        "`--testmon`, twice: the second run has nothing to do",
        ("pytest-testmon",),
        {
            "shop.py": "def price():\n    return 3\n",
            "test_it.py": """
                import shop

                def test_price():
                    assert shop.price() == 3
                """,
        },
        ("--testmon", "--testmon"),
        statuses=(0, 0),
        prints=("testmon: ", "no tests ran"),
        varies=(".testmondata*",),
        note="it records in one process what each test executes",
    ),
    Sample(
        "pytest-bdd",
        "a feature file, `--cucumberjson`, `--gherkin-terminal-reporter`",
        ("pytest-bdd",),
        {
            "shop.feature": """
                Feature: Shop
                    Scenario: Buy
                        Given 3 apples
                        When I buy 1
                        Then 2 are left
                """,
            "test_it.py": """
                from pytest_bdd import given, parsers, scenarios, then, when

                scenarios("shop.feature")

                @given(parsers.parse("{count:d} apples"), target_fixture="shop")
                def shop(count):
                    return {"apples": count}

                @when(parsers.parse("I buy {count:d}"))
                def buy(shop, count):
                    shop["apples"] -= count

                @then(parsers.parse("{count:d} are left"))
                def left(shop, count):
                    assert shop["apples"] == count
                """,
        },
        ("--cucumberjson=cucumber.json --gherkin-terminal-reporter -vv",),
        prints=("Scenario: Buy", "Then 2 are left"),
        varies=("cucumber.json",),
    ),
    Sample(
        "pytest-retry",
        "`--retries`",
        ("pytest-retry",),
        """
        seen = []

        def test_second_try():
            seen.append(1)
            assert len(seen) == 2
        """,
        ("--retries=2",),
        prints=("1 retried",),
    ),
    Sample(
        "pytest-snapshot",
        "`--snapshot-update`, then a comparison with the snapshots",
        ("snapshot",),
        """
        def test_text(snapshot):
            snapshot.assert_match("hello", "greeting.txt")
        """,
        ("--snapshot-update", ""),
        statuses=(1, 0),
        note="the snapshots need `--microvm-write-back='snapshots/'`",
    ),
    Sample(
        "inline-snapshot",
        "`--inline-snapshot=create,fix`, then a comparison with the snapshots",
        ("inline_snapshot",),
        """
        from inline_snapshot import snapshot

        def test_wrong():
            assert 1 + 1 == snapshot(3)

        def test_missing():
            assert {"a": [1, 2]} == snapshot()
        """,
        ("--inline-snapshot=create,fix", ""),
        statuses=(1, 0),
        prints=("2 passed",),
        note="rewrites the source; needs `--microvm-isolation=session`",
    ),
    Sample(
        "pytest-dependency",
        "marker `dependency`",
        ("dependency",),
        """
        import pytest

        @pytest.mark.dependency()
        def test_first():
            pass

        @pytest.mark.dependency(depends=["test_first"])
        def test_second():
            pass
        """,
        note="needs `--microvm-isolation=module`",
    ),
    Sample(
        "pytest-regressions",
        "fixture `data_regression`, `--regen-all`, then a comparison",
        ("regressions", "pytest-datadir"),
        """
        def test_data(data_regression):
            data_regression.check({"a": 1})
        """,
        ("--regen-all", ""),
        statuses=(0, 0),
    ),
)
