"""SandboxConfig: programs that the model writes."""

from dataclasses import dataclass

from slime.config.fields import flag


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Sandbox."""

    sandbox_programs: int | None = flag(
        None, "Programs at a time, 64 at most; by default one for each processor.", at_least=1
    )
    sandbox_cpu_s: int = flag(5, "Processor seconds of one program.", at_least=1)
    sandbox_wall_s: float = flag(20.0, "Seconds of one program on the clock.", above=0)
    sandbox_memory_mb: int = flag(512, "Memory of one program, MiB.", at_least=16)
    sandbox_output_kb: int = flag(
        256,
        "What one program may write to standard output, and to standard error, KiB.",
        at_least=1,
    )
    sandbox_packages: tuple[str, ...] = flag(
        (), "Packages that programs may import besides the standard library.", nargs="+"
    )
