"""A configuration of your own: any object with a ``hardware`` that has the two attributes.

Here it is a pydantic model, as it is read from a file. A wrong value is refused before anything is
touched, and the error names the attribute in full.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import BaseModel

from orchard_infra import ConfigurationError, managed_environment


class Hardware(BaseModel):
    lock_file_path: Path
    allow_process_kill: bool = False
    device: str = "cpu"


class Config(BaseModel):
    hardware: Hardware
    epochs: int = 3


def main() -> None:
    with TemporaryDirectory() as directory:
        hardware = {"lock_file_path": f"{directory}/locks/demo.lock"}
        config = Config.model_validate({"hardware": hardware, "epochs": 2})
        with managed_environment(config) as env:
            print(f"{config.epochs} epochs under {env.lock_path.name}")

        config.hardware.allow_process_kill = "false"  # type: ignore[assignment]
        try:
            with managed_environment(config):
                print("never reached")
        except ConfigurationError as error:
            print("refused:", error)


if __name__ == "__main__":
    main()
