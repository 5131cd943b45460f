"""What a person types."""

import oq_runtime

oq_runtime.leave_working_directory_out()
