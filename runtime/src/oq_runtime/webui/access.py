"""Who may do what on the site: each of its views is decided in one table.

The engine's views check the owner of a calculation in some places and in others not, take paths on
the server, and believe who a job is for. Here all is asked before a view is called; a view that is
not in the table is refused, as one of a newer engine would be.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum, auto
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth.signals import user_logged_in, user_login_failed
from django.core.exceptions import BadRequest, PermissionDenied, SuspiciousOperation
from django.http import Http404, HttpResponse, JsonResponse
from django.http.multipartparser import MultiPartParserError
from openquake.commonlib import logs
from openquake.server import utils, views

from oq_runtime.engine import abort
from oq_runtime.engine.jobtable import MOST_ROWS, UNFINISHED, JobTable, Status
from oq_runtime.errors import ConfigError, InputError
from oq_runtime.files import places
from oq_runtime.files.places import owner
from oq_runtime.text import clean
from oq_runtime.webui import uploads
from oq_runtime.webui.logins import Logins

log = logging.getLogger("oq_runtime")

#: what Django says of a request that cannot be read
MALFORMED = (BadRequest, SuspiciousOperation, MultiPartParserError)
#: how a line begins about an error that may be anything's
UNFORESEEN = "the engine could not answer this"
#: how the engine lets a condition be true or false
TRUTHS = ("0", "1", "true", "false")


class Rule(Enum):
    """Who may call a view."""

    ANYONE = auto()  # before a login, too
    LOGIN = auto()  # takes a password: so many times
    RESULT = auto()  # the same as of a reader, by the number of an output
    MEMBER = auto()  # has logged in; what it may see or change the view itself asks
    LIST = auto()  # the same, with conditions that go into SQL
    READER = auto()  # of a calculation: owner, owner's group, administrator; all, if it is shared
    OWNER = auto()  # of a calculation: owner, owner's group, administrator
    RUN = auto()  # uploads a job, for nobody but oneself
    CHECK = auto()  # uploads files
    NEVER = auto()  # takes a path on the server
    ELSEWHERE = auto()  # asks whether a file is here as well: no file is


VIEWS: Mapping[str, Rule] = {
    "activity": Rule.MEMBER,  # ours; it shows what ``calc_list`` would
    "ajax_login": Rule.LOGIN,
    "ajax_logout": Rule.ANYONE,
    "aggrisk_tags": Rule.READER,  # of 3.23
    "calc": Rule.READER,
    "calc_abort": Rule.OWNER,
    "calc_add_tag": Rule.OWNER,
    "calc_create_tag": Rule.MEMBER,  # of level 2
    "calc_datastore": Rule.READER,
    "calc_delete_tag": Rule.MEMBER,  # of level 2
    "calc_get_preferred_job_for_tag": Rule.MEMBER,
    "calc_list": Rule.LIST,
    "calc_list_tags": Rule.MEMBER,
    "calc_log": Rule.READER,
    "calc_log_size": Rule.READER,
    "calc_remove": Rule.OWNER,
    "calc_remove_tag": Rule.OWNER,
    "calc_result": Rule.RESULT,  # the view asks for the owner
    "calc_results": Rule.READER,
    "calc_run": Rule.RUN,
    "calc_run_ini": Rule.NEVER,
    "calc_run_scenario_from_ses": Rule.NEVER,
    "calc_set_preferred_job_for_tag": Rule.OWNER,
    "calc_share": Rule.OWNER,
    "calc_traceback": Rule.READER,
    "calc_unset_preferred_job_for_tag": Rule.MEMBER,  # of level 2
    "calc_unshare": Rule.OWNER,
    "calc_zip": Rule.READER,
    "download_png": Rule.READER,
    "extract": Rule.READER,
    "get_available_gsims": Rule.MEMBER,
    "get_engine_latest_version": Rule.MEMBER,
    "get_engine_version": Rule.MEMBER,
    "get_ini_defaults": Rule.MEMBER,
    "jobs_from_inis": Rule.NEVER,
    "license": Rule.MEMBER,
    "on_same_fs": Rule.ELSEWHERE,
    "report": Rule.OWNER,  # ours
    "validate_ini": Rule.NEVER,
    "validate_nrml": Rule.MEMBER,
    "validate_zip": Rule.CHECK,
    "web_engine": Rule.MEMBER,
    "web_engine_get_outputs": Rule.READER,
    # of Django, and of the question for consent to cookies
    "CookieGroupAcceptView": Rule.ANYONE,
    "CookieGroupDeclineView": Rule.ANYONE,
    "CookieGroupListView": Rule.ANYONE,
    "CookieStatusView": Rule.ANYONE,
    "LoginView": Rule.LOGIN,
    "LogoutView": Rule.ANYONE,
    "PasswordResetCompleteView": Rule.ANYONE,
    "PasswordResetConfirmView": Rule.ANYONE,
    "PasswordResetDoneView": Rule.ANYONE,
    "PasswordResetView": Rule.ANYONE,
    "RedirectView": Rule.MEMBER,
}
#: those that a reader may call, whoever has run the calculation: they read the job database alone
OF_DATABASE = {"calc", "calc_log", "calc_log_size", "calc_results", "calc_traceback"}
#: rules of the applications that ask for the right by themselves: Django's administration
APPS: Mapping[str, Rule] = {"admin": Rule.LOGIN}
#: fields of a form with which a calculation is run; nobody reads the last two of the engine's page
RUN_FIELDS = {
    "job_ini", "hazard_job_id", "notify_to", "job_owner", "csrfmiddlewaretoken",
    "calculation_type", "database",
}  # fmt: skip

NAMES: Mapping[Callable[..., Any], str] = {
    view: name for name, view in vars(views).items() if inspect.isfunction(view)
}


def name_of(view: Callable[..., Any]) -> str:
    """Return the name of a view as in the table; decorators have hidden that of a function."""
    if kind := getattr(view, "view_class", None):
        return str(kind.__name__)
    return NAMES.get(view) or str(getattr(view, "__name__", "a view without a name"))


def rule_of(match: Any) -> Rule | None:
    """Return the rule for a resolved URL, Django's ``ResolverMatch``; None if it has none."""
    for app in match.app_names:
        if app in APPS:
            return APPS[app]
    return VIEWS.get(name_of(match.func))


class Refused(Exception):
    """The answer instead of the view's.

    :param status: of HTTP
    :param text: one sentence
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class LoginOfPrograms:
    """The middleware before the engine's that asks for a login: a program is not sent to a page.

    The engine's knows its API only where the site has no prefix.
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.api = f"{settings.SITE.prefix}/v1/"

    def __call__(self, request: Any) -> Any:
        if request.path_info.startswith(self.api) and not request.user.is_authenticated:
            return JsonResponse({"error": "log in first"}, status=403)
        return self.get_response(request)


class Access:
    """The middleware; it stands behind the engine's own, which asks for a login.

    :param get_response: the rest of the site
    """

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response
        self.logins = Logins()
        user_login_failed.connect(self._failed, weak=False)
        user_logged_in.connect(self._succeeded, weak=False)

    def __call__(self, request: Any) -> Any:
        try:
            response = self.get_response(request)
        finally:
            uploads.upload.forget()
        match = getattr(request, "resolver_match", None)
        if response.status_code == 500 and match:
            return _one_sentence(response, rule_of(match))
        return response

    def process_view(
        self, request: Any, view: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        rule = rule_of(request.resolver_match)
        name, arguments = name_of(view), [*args, *kwargs.values()]
        try:
            self._check(rule, request, arguments)
            if name == "report" or (rule is Rule.READER and name not in OF_DATABASE):
                check_results(int(arguments[0]))
            if request.method == "POST" and name == "calc_remove":
                check_removal(int(arguments[0]))
            if request.method == "POST" and name == "calc_abort":
                return JsonResponse(aborted(int(arguments[0])))
        except Refused as exc:
            log.warning("refused %s to %s: %s", name, clean(str(request.user), 150), exc)
            return _line(request, str(exc), exc.status)
        except (InputError, *MALFORMED) as exc:
            return _line(request, str(exc), 400)
        return JsonResponse({"success": False}) if rule is Rule.ELSEWHERE else None

    def process_exception(self, request: Any, exc: Exception) -> Any:
        """Tell in a line what the engine has not foreseen; the log has the rest."""
        if isinstance(exc, (Http404, PermissionDenied)):
            return None
        if isinstance(exc, Refused):
            return _line(request, str(exc), exc.status)
        if isinstance(exc, (InputError, *MALFORMED)):
            return _line(request, str(exc), 400)
        if isinstance(exc, OSError) and rule_of(request.resolver_match) is Rule.READER:
            return JsonResponse(
                {"error": f"the results cannot be read: {clean(str(exc))}"}, status=404
            )
        log.error("%s %s", request.method, clean(request.path, 200), exc_info=exc)
        return JsonResponse({"error": f"{UNFORESEEN}: {_words(exc)}"}, status=500)

    def _check(self, rule: Rule | None, request: Any, arguments: Sequence[Any]) -> None:
        """Raise Refused or InputError when a request may not reach its view."""
        most = settings.SITE.upload_bytes
        if int(request.META.get("CONTENT_LENGTH") or 0) > most:
            raise Refused(413, f"these files are more than this site takes: {most >> 20} MiB")
        if rule is None:
            raise Refused(403, "this is not open on this site")
        if rule is Rule.LOGIN and request.method == "POST" and "password" in request.POST:
            self._check_login(request)
        if rule in (Rule.ANYONE, Rule.LOGIN):
            return
        if not request.user.is_authenticated:
            raise Refused(403, "log in first")
        match rule:
            case Rule.READER | Rule.OWNER:
                check_owner(request, int(arguments[0]), change=rule is Rule.OWNER)
            case Rule.LIST:
                check_conditions(request)
            case Rule.RESULT:
                for number in JobTable(logs.dbcmd).jobs_of_output(int(arguments[0])):
                    check_results(number)
            case Rule.RUN:
                check_run(request)
            case Rule.CHECK:
                uploads.check(request.FILES.getlist("archive"), ".ini")
                check_parents(request, uploads.upload.parents)
            case Rule.NEVER:
                raise Refused(403, "paths on the server are not taken; upload the files")

    def _check_login(self, request: Any) -> None:
        account = request.POST.get("username", "")
        if wait_s := self.logins.wait_s(account, request.META["REMOTE_ADDR"]):
            minutes = math.ceil(wait_s / 60)
            raise Refused(429, f"too many failed logins; try again in {minutes} minutes")

    def _failed(self, credentials: Mapping[str, Any], request: Any = None, **_: Any) -> None:
        if request is not None:
            account = str(credentials.get("username", ""))
            self.logins.failed(account, request.META["REMOTE_ADDR"])

    def _succeeded(self, user: Any, **_: Any) -> None:
        self.logins.succeeded(user.get_username())


def check_owner(request: Any, number: int, *, change: bool) -> None:
    """Raise Refused unless the user may see, or change, the calculation of this number."""
    job = logs.dbcmd("get_job", number) if number <= MOST_ROWS else None
    if job is None:
        raise Refused(404, f"there is no calculation {number}")
    own = job.user_name in utils.get_valid_users(request) or utils.is_superuser(request)
    if not own and (change or not utils.user_has_permission(request, job.user_name, job.status)):
        raise Refused(403, f"calculation {number} belongs to somebody else")


def _line(request: Any, line: str, status: int) -> HttpResponse:
    """Answer with a line: as JSON, or as text where a browser shows what comes as a page."""
    line = clean(line)
    if request.resolver_match.url_name == "report" and "text/html" in request.headers.get(
        "Accept", ""
    ):
        return HttpResponse(f"{line}\n", status=status, content_type="text/plain; charset=utf-8")
    return JsonResponse({"error": line}, status=status)


def check_results(number: int) -> None:
    """Raise Refused unless the results of a calculation were written by whoever serves this site.

    They are read with the rights of the site, and are more than data: what they are linked to, and
    the pickles in them, are their owner's choice.
    """
    job = JobTable(logs.dbcmd).job(number)
    if job is None or not os.path.lexists(path := Path(job.path)):
        return  # the view says so
    trusted = (0, os.geteuid())
    links = [one for one in path.parents if one.is_symlink()]
    if any(one.lstat().st_uid not in trusted for one in (path, *links)) or path.is_symlink():
        remedy = "oq-report and oq engine show them to whoever may read them"
        raise Refused(403, f"calculation {number} has not left its results to this site; {remedy}")


def check_parents(request: Any, numbers: Iterable[int]) -> None:
    """Raise Refused unless a calculation of the user may start from these."""
    for number in numbers:
        check_owner(request, number, change=False)
        check_results(number)


def check_removal(number: int) -> None:
    """Raise Refused where the engine would delete the row of a calculation, and nothing else."""
    job = JobTable(logs.dbcmd).job(number)
    if job is None:
        return
    if job.status in UNFINISHED:
        raise Refused(403, f"calculation {number} is {job.status}; abort it first")
    path = Path(job.path)
    try:
        stays = path.exists() and not os.access(path.parent, os.W_OK)
    except PermissionError:  # it is where nobody else may look
        stays = True
    if stays:
        remedy = f"ask {owner(path)} to delete them with oq engine --dc {number}"
        raise Refused(403, f"this site may not delete the results; {remedy}")


def aborted(number: int) -> dict[str, str]:
    """Abort a calculation: the engine's view signals whoever has the pid of its row by now.

    :returns: what the engine's view would answer
    """
    table = JobTable(logs.dbcmd)
    said = abort.end(table, number)
    job = table.job(number)
    done = job is not None and job.status == Status.ABORTED
    log.info("abort of calculation %d: %s", number, said)
    return {"success" if done else "error": said}


def check_conditions(request: Any) -> None:
    """Raise InputError for a condition on the list that is no date, number or truth.

    3.23 puts the date into SQL.
    """
    start = request.GET.get("start_time")
    try:
        datetime.fromisoformat(start or "2000-01-01")
    except ValueError:
        raise InputError("start_time takes a date as 2028-01-31") from None
    for name in ("limit", "offset", "preferred_only"):
        text = request.GET.get(name, "0")
        if not (text.isascii() and text.isdigit() and int(text) <= MOST_ROWS):
            raise InputError(f"{name} takes a whole number")
    for name in ("is_running", "include_shared"):
        if (request.GET.get(name) or "0").lower() not in TRUTHS:
            raise InputError(f"{name} takes one of {', '.join(TRUTHS)}")


def check_run(request: Any) -> None:
    """Raise Refused or InputError unless a calculation is the user's own, with all its files."""
    if unknown := sorted(set(request.POST) - RUN_FIELDS):
        raise InputError(f"the field {clean(unknown[0], 50)} is not taken")
    if request.POST.get("job_owner") not in (None, "", request.user.get_username()):
        raise Refused(403, "a calculation is run for nobody but oneself; leave job_owner out")
    parent = request.POST.get("hazard_job_id")
    if parent:
        if not (parent.isascii() and parent.isdigit()):
            raise InputError("hazard_job_id takes the number of a calculation")
        check_parents(request, [int(parent)])
    try:
        places.room(Path(logs.get_datadir()), "tell the administrator of this site")
    except ConfigError as exc:  # before it has a number
        raise Refused(503, str(exc)) from None
    ending = request.POST.get("job_ini") or ("risk.ini" if parent else ".ini")
    uploads.check(request.FILES.getlist("archive"), ending)
    check_parents(request, uploads.upload.parents)


def _one_sentence(response: Any, rule: Rule | None) -> HttpResponse:
    """Return the engine's answer with an error of its own, without the traceback."""
    text = response.content.decode(errors="replace")
    if rule is Rule.RUN and "traceback" in (found := json.loads(text)):
        said, number = found["traceback"][-1], found["job_id"]
        return JsonResponse({"error": said, "job_id": number}, status=400)
    if response["Content-Type"].startswith("text/plain"):  # what it has been asked for is not there
        return JsonResponse({"error": clean(text.split("\n")[0])}, status=400)
    return response


def _words(exc: Exception) -> str:
    return clean(f"{type(exc).__name__}: {exc}")
