"""Keys to APIs. They stand in files, because settings are written to config.json."""

from etils import epath

from lfm_jax.configuration import ConfigError


def read_key(file: str, setting: str = "api_key_file") -> str:
    """The first line of a file; "" of none.

    Raises:
      ConfigError: the file cannot be read, or has no key of ASCII characters; the message names the setting.
    """
    if not file:
        return ""
    try:
        key = (epath.Path(file).read_text().splitlines() or [""])[0].strip()
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read ({error.strerror}); write the key into it.") from error
    if not key.isascii() or not key:
        raise ConfigError(f"{setting}: the first line of {file} must be a key of ASCII characters.")
    return key
