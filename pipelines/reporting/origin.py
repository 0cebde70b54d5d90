"""Who ran a comparison, when and where, and the pages about the same run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PageLink:
    """A page about the same run."""

    title: str
    address: str


@dataclass(frozen=True)
class FlowRunReference:
    """A Prefect flow run, and where Prefect's pages are."""

    id: str = ""
    """Empty outside a flow run."""
    pages: str = ""
    """Address of the pages; empty if they end with the run, or are not known."""

    @property
    def page(self) -> str:
        """The address of the page of the flow run; empty without one."""
        return f"{self.pages.rstrip('/')}/runs/flow-run/{self.id}" if self.pages and self.id else ""


NO_FLOW_RUN = FlowRunReference()


@dataclass(frozen=True)
class RunOrigin:
    """Where a comparison comes from."""

    finished: str
    """Date and time in UTC."""
    author: str
    host: str
    recipe_digest: str
    """SHA-256 of the recipe with every setting written out."""
    links: tuple[PageLink, ...] = ()

    def markdown(self) -> str:
        """Return it as one paragraph of Markdown."""
        facts = f"{self.finished} by {self.author} on {self.host}, recipe `{self.recipe_digest}`"
        links = [f"[{link.title}]({link.address})" for link in self.links]
        return " · ".join([facts, *links])
