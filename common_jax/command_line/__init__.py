"""A command's flags, its config file, and the fields that flags set."""

from common_jax.command_line.commands import USER_ERRORS, Command, dispatch, read_settings
from common_jax.command_line.fields import change_config, check_field, set_field
from common_jax.command_line.files import load_beside, read_config_file, run_config_file
from common_jax.command_line.reading import HOST_FLAGS, define, read
from common_jax.command_line.systems import System, check_system, unread
