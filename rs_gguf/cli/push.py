"""Define the `rs-export push` command: upload the files of a run to the hub.

In: a run folder and the name of a repository. Out: a list of what would be uploaded, or the commit's address.
"""

from __future__ import annotations

from pathlib import Path

import click

from rs_gguf.errors import escape_control_chars


@click.command("push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--yes", is_flag=True, help="Upload. Without it, only list the files and print the card.")
def push(folder: Path, repository: str, yes: bool) -> None:
    """Upload the files of a run to a model repository of the hub.

    FOLDER holds recipe.toml, the GGUF files, metrics.json and card.md. Also uploads your own prompts,
    preset.ini for llama-server, and reproduce.json for `rs-export run --from`. Answers to harmful prompts are
    never uploaded. A new repository is public. The token is HF_TOKEN, or the one of `hf auth login`.
    """
    from rs_gguf.models.upload import check_repository, upload
    from rs_gguf.pipeline.publication import prepare

    check_repository(repository)
    publication = prepare(folder)
    for name in publication.contents:
        click.echo(f"{publication.size(name):>12,}  {escape_control_chars(name)}")
    for name, reason in publication.left_out.items():
        click.echo(f"{'left out':>12}  {escape_control_chars(name)}: {reason}")
    if publication.unmeasured:
        click.echo(f"Not measured: {', '.join(publication.unmeasured)}. The card says so.", err=True)
    if yes:
        click.echo(upload(repository, publication.contents, "Upload steering files with rs-gguf"))
        return
    click.echo("\nREADME.md:\n")
    click.echo("\n".join(map(escape_control_chars, publication.card.split("\n"))))
    click.echo(f"Nothing was uploaded. To upload to {repository}, add --yes.", err=True)
