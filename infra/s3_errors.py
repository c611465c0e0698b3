"""What an object store's errors mean for a person: the user's mistake with its remedy, or an I/O error."""

from __future__ import annotations

import errno

from boto3.exceptions import RetriesExceededError
from botocore import exceptions as boto
from botocore.exceptions import ClientError
from botocore.parsers import ResponseParserError

# What passes by itself: a connection that broke, before the answer or in it, and these answers.
BROKEN_CONNECTIONS = (
    boto.HTTPClientError,
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    RetriesExceededError,
    ResponseParserError,
)
TRANSIENT_STATUSES = {429, 500, 502, 503, 504}
# The last: the end of an upload in parts was done, but its answer was lost. A new upload is the way out.
TRANSIENT_CODES = {"RequestTimeout", "SlowDown", "InternalError", "Throttling", "NoSuchUpload"}

NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.ConfigParseError,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
    boto.SSOTokenLoadError,
)
UNREACHABLE = (
    boto.EndpointConnectionError,
    boto.ConnectTimeoutError,
    boto.ProxyConnectionError,
    boto.SSLError,
)
REFUSED_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
REGION_CODES = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}


class StoreRefuses(ValueError):
    """The store does not answer, or does not accept us. At the start of a command that is the user's mistake;
    hours later, while credentials are being renewed or an address moves, it may pass."""


def status_of(error: ClientError) -> int:
    """The HTTP status of a refused request."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_an_answer(error: Exception) -> bool:
    """Whether the store itself said no."""
    return isinstance(_cause(error), ClientError)


def is_transient(error: Exception, *, has_answered: bool) -> bool:
    """Whether the same request may succeed later. `has_answered`: the store has, before; one that never did
    is taken for a wrong address, which does not pass."""
    error = _cause(error)
    if isinstance(error, ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        return status_of(error) in TRANSIENT_STATUSES or code in TRANSIENT_CODES
    if isinstance(error, UNREACHABLE):
        return has_answered and not isinstance(error, boto.SSLError)
    return isinstance(error, BROKEN_CONNECTIONS)


def translate(error: Exception, uri: str, endpoint: str | None, *, has_answered: bool) -> Exception:
    """StoreRefuses or another ValueError with the remedy for what the user can mend, FileNotFoundError for
    what is not there, else OSError; each names `uri`. `has_answered` as in `is_transient`."""
    where = endpoint or "AWS S3"
    error = _cause(error)
    if isinstance(error, ClientError):
        return _of_answer(error, uri, where)
    if isinstance(error, NO_CREDENTIALS):
        return StoreRefuses(
            f"{uri}: no usable credentials for {where} ({_one_line(error)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, UNREACHABLE) and not has_answered:
        return StoreRefuses(
            f"{uri}: cannot reach {where} ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
        )
    if isinstance(error, boto.ParamValidationError):
        return ValueError(f"{uri}: S3 cannot have this name ({_one_line(error)})")
    return OSError(errno.EIO, f"{type(error).__name__}: {_one_line(error)}", uri)


def _cause(error: Exception) -> Exception:
    """boto3's transfer errors hide the store's answer behind a sentence."""
    is_hidden = not isinstance(error, ClientError) and isinstance(error.__context__, ClientError)
    return error.__context__ if is_hidden else error  # pyright: ignore[reportReturnType]


def _of_answer(error: ClientError, uri: str, where: str) -> Exception:
    code = error.response.get("Error", {}).get("Code", "")
    message = error.response.get("Error", {}).get("Message", "")
    status = status_of(error)
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return StoreRefuses(f"{uri}: there is no bucket {bucket!r} at {where}; create it or correct the name")
    if code in {"NoSuchKey", "NotFound", "404"} or status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if code in REGION_CODES or status == 301:
        return ValueError(f"{uri}: {where} wants another region ({message}); set AWS_REGION to the bucket's")
    if code in REFUSED_CODES:
        return StoreRefuses(
            f"{uri}: {where} does not accept these credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or log in again"
        )
    if status in {401, 403}:
        return StoreRefuses(
            f"{uri}: {where} says {code or status}; these credentials may not do that there: are "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right, and do they allow to list the bucket, and to "
            "get, put and delete its objects?"
        )
    return OSError(errno.EIO, f"{where} answers {status} {code}: {message}", uri)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
