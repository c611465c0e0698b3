"""What an object store's errors mean for a person: the user's mistake with its remedy, or an I/O error."""

from __future__ import annotations

import errno

from botocore import exceptions as boto
from botocore.exceptions import ClientError

# The connection broke while the body was read.
CUT_IN_THE_BODY = (
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
    boto.ConnectionClosedError,
)

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


def status_of(error: ClientError) -> int:
    """The HTTP status of a refused request."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def translate(error: Exception, uri: str, endpoint: str | None) -> Exception:
    """ValueError with the remedy for what the user can mend, FileNotFoundError for what is not there, else
    OSError; each names `uri`."""
    where = endpoint or "AWS S3"
    if not isinstance(error, ClientError) and isinstance(error.__context__, ClientError):
        error = error.__context__  # boto3's transfer errors hide the answer behind a sentence
    if isinstance(error, ClientError):
        return _of_answer(error, uri, where)
    if isinstance(error, NO_CREDENTIALS):
        return ValueError(
            f"{uri}: no usable credentials for {where} ({_one_line(error)}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if isinstance(error, UNREACHABLE):
        return ValueError(
            f"{uri}: cannot reach {where} ({_one_line(error)}); check AWS_ENDPOINT_URL and the network"
        )
    if isinstance(error, boto.ParamValidationError):
        return ValueError(f"{uri}: S3 cannot have this name ({_one_line(error)})")
    return OSError(errno.EIO, f"{type(error).__name__}: {_one_line(error)}", uri)


def _of_answer(error: ClientError, uri: str, where: str) -> Exception:
    code = error.response.get("Error", {}).get("Code", "")
    message = error.response.get("Error", {}).get("Message", "")
    status = status_of(error)
    if code == "NoSuchBucket":
        bucket = uri.removeprefix("s3://").partition("/")[0]
        return ValueError(f"{uri}: there is no bucket {bucket!r} at {where}; create it or correct the name")
    if code in {"NoSuchKey", "NotFound", "404"} or status == 404:
        return FileNotFoundError(errno.ENOENT, "no such object", uri)
    if code in REGION_CODES or status == 301:
        return ValueError(f"{uri}: {where} wants another region ({message}); set AWS_REGION to the bucket's")
    if code in REFUSED_CODES:
        return ValueError(
            f"{uri}: {where} does not accept these credentials ({code}); check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or log in again"
        )
    if status in {401, 403}:
        return ValueError(
            f"{uri}: {where} says {code or status}; these credentials may not do that there: "
            "they need to list the bucket, and to get, put and delete its objects"
        )
    return OSError(errno.EIO, f"{where} answers {status} {code}: {message}", uri)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
