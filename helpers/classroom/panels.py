"""Panels: widgets that drive real workers, each with a static picture beside it.

Panels are built of sliders, buttons and HTML only. An Output widget would swallow what is printed,
and a notebook with one cannot be compared strictly.
"""

from __future__ import annotations

import base64
import html
import weakref

import ipywidgets as widgets
import matplotlib.pyplot as plt
from IPython.display import display

from helpers.classroom.plots import plot_speedup, png
from helpers.classroom.timeline import LivePicture, Recorder, draw_schedule


def display_panel(widget, picture: bytes, caption: str, alt: str) -> None:
    """Display a widget, and a picture of it for places where no kernel runs.

    Parameters
    ----------
    widget : ipywidgets.Widget
    picture : bytes
        PNG. A stored notebook, GitHub and print show it in place of the widget.
    caption : str
        Starts with "Figure 1."; stands below.
    alt : str
        What the panel shows and does, for those who cannot see it.
    """
    views = dict(widget._repr_mimebundle_())
    views["image/png"] = base64.b64encode(picture).decode()
    views["text/plain"] = alt
    display(views, raw=True, metadata={"image/png": {"alt": alt}})
    display({"text/markdown": f"*{caption}*", "text/plain": caption}, raw=True)


def picture_html(picture: bytes, alt: str) -> str:
    """An HTML image of a PNG, with its text."""
    data = base64.b64encode(picture).decode()
    return (
        f'<img style="max-width:100%" alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
    )


class WorkerPanel:
    """A slider that changes the number of workers, and what a job gains from it.

    The panel runs the job once when it is made. Moving the slider starts or stops real workers,
    runs the job again and adds the measured speed-up to the figure, beside the prediction.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    job : callable
        ``job(client)`` runs the job once and returns its seconds.
    predicted : dict of int to float
        Seconds predicted, by number of workers.
    measured : dict of int to float
        Seconds measured so far; the panel adds to it.
    """

    def __init__(self, cluster, job, predicted, measured):
        # Widgets live as long as the kernel: they must not keep workers alive that long.
        self.cluster = weakref.proxy(cluster)
        self.job, self.cores = job, cluster.cores
        self.predicted, self.measured = predicted, measured
        self.live = LivePicture(cluster)
        self.slider = workers_slider(cluster, most=self.cores + 1)
        self.again = widgets.Button(description="Run the job again")
        self.status = widgets.HTML()
        self.figure = widgets.HTML()
        self._guarded(self._measure)
        self.slider.observe(self._moved, names="value")
        self.again.on_click(lambda _: self._guarded(self._measure))
        top = widgets.HBox([self.slider, self.again, self.status])
        self.widget = widgets.VBox([top, self.live.widget, self.figure, self._dashboard()])

    def display(self, caption: str) -> None:
        """Show the panel, with a static picture beside it and a caption below."""
        display_panel(self.widget, self._static_picture(), caption, self.alt)

    def stop(self) -> None:
        """End the live picture. The panel stays as a picture."""
        self.live.stop()
        self.slider.disabled = self.again.disabled = True

    @property
    def alt(self) -> str:
        """What the panel is, in words."""
        return (
            "A panel with a slider for the number of workers, a live picture of what each worker "
            "is doing, a figure of the speed-up, measured and predicted, by number of workers, and "
            "a link to Dask's dashboard."
        )

    def _dashboard(self) -> widgets.HTML:
        link = html.escape(self.cluster.dashboard_link or "")
        style = 'target="_blank" style="text-decoration: underline"'
        words = f'<a href="{link}" {style}>Dask\'s dashboard of this cluster</a>'
        return widgets.HTML(words if link else "This cluster has no dashboard.")

    def _running(self) -> str:
        number = self.cluster.n_workers
        return f"{number} worker{'s' * (number != 1)}"

    def _say(self, sentence: str) -> None:
        self.status.value = f'<span role="status">{html.escape(sentence)}</span>'

    def _draw(self) -> None:
        figure = plt.figure(figsize=(6, 3.4))
        self._draw_speedup(figure.subplots())
        self.figure.value = picture_html(png(figure), "Speed-up by number of workers.")
        plt.close(figure)

    def _draw_speedup(self, ax) -> None:
        plot_speedup(self.measured, self.predicted, self.cores, ax)
        ax.set_title("One job on more workers")

    def _static_picture(self) -> bytes:
        """The panel as a picture: its slider, what the workers did, and the figure."""
        workers = self.cluster.n_workers
        figure, axes = plt.subplots(
            3, 1, figsize=(6, 5.6), height_ratios=[0.25, 0.35 * workers, 3], layout="constrained"
        )
        slider, timeline, speedup = axes
        slider.plot([self.slider.min, self.slider.max], [0, 0], color="0.7", linewidth=3)
        slider.plot(workers, 0, "o", color="0.3", markersize=10)
        slider.set_title(f"Workers: {workers}", fontsize=10)
        slider.set_axis_off()
        draw_schedule(self.events, workers, timeline)
        self._draw_speedup(speedup)
        picture = png(figure)
        plt.close(figure)
        return picture

    def _moved(self, change) -> None:
        self._guarded(lambda: self._scale(change["new"]))

    def _scale(self, workers: int) -> None:
        self._say(f"changing to {workers} …")
        self.cluster.scale(workers)
        self._measure()

    def _measure(self) -> None:
        self._say(f"{self._running()}: the job runs …")
        with Recorder(self.cluster) as recorder:
            seconds = self.job(self.cluster.client)
        self.events = recorder.events
        self.measured[self.cluster.n_workers] = seconds
        self._draw()
        self._say(f"{self._running()}: {seconds:.2f} s.")

    def _guarded(self, act) -> None:
        """Run one action; a failure becomes a sentence in the panel, and the panel lives on."""
        self.slider.disabled = self.again.disabled = True
        try:
            act()
        except ReferenceError:
            self._say("These workers were stopped: run the notebook's cells again.")
        except Exception as error:
            self._say(f"That did not work: {error}")
        finally:
            self.slider.disabled = self.again.disabled = False


class SettingsPanel:
    """Controls of one setting; whenever one has moved, it is tried and the figure is drawn anew.

    A panel derives from it, and says in `try_setting` what happens on the workers, and in `draw`
    what the figure shows.

    Parameters
    ----------
    cluster : helpers.cluster.Cluster
    controls : sequence of ipywidgets.Widget
        Each with a ``value`` and a ``description``.
    """

    alt: str
    """What the panel is, in words."""
    working = "The ranks train …"

    def __init__(self, cluster, controls):
        # Widgets live as long as the kernel: they must not keep workers alive that long.
        self.cluster, self.controls = weakref.proxy(cluster), tuple(controls)
        self.status, self.figure = widgets.HTML(), widgets.HTML()
        self._try()
        for control in self.controls:
            control.observe(self._moved, names="value")
        # On a second line rather than too narrow to be moved.
        rows = widgets.Box(self.controls, layout=widgets.Layout(flex_flow="row wrap"))
        self.widget = widgets.VBox([rows, self.status, self.figure])

    def try_setting(self) -> str:
        """Run the setting of the controls; returns the sentence that reports on it."""
        raise NotImplementedError

    def draw(self) -> plt.Figure:
        """The figure of what was tried so far."""
        raise NotImplementedError

    def display(self, caption: str) -> None:
        """Show the panel, with a static picture beside it and a caption below."""
        figure = self.draw()
        # For places without widgets the setting stands above the picture.
        words = [f"{c.description}: {c.value}" for c in self.controls]
        figure.suptitle("   |   ".join(words), fontsize=10)
        display_panel(self.widget, _closed(figure), caption, self.alt)

    def say(self, sentence: str) -> None:
        """Write a sentence below the controls; screen readers read it out."""
        self.status.value = f'<span role="status">{html.escape(sentence)}</span>'

    def _try(self):
        if self.cluster.closed:
            raise ReferenceError
        sentence = self.try_setting()
        self.figure.value = picture_html(_closed(self.draw()), self.alt)
        self.say(sentence)

    def _moved(self, _change):
        """Try the new setting; a failure becomes a sentence, and the panel lives on."""
        for control in self.controls:
            control.disabled = True
        self.say(self.working)
        try:
            self._try()
        except ReferenceError:
            self.say("These workers were stopped: run the notebook's cells again.")
        except Exception as error:
            self.say(f"That did not work: {error}".splitlines()[0])
        finally:
            for control in self.controls:
                control.disabled = False


WHOLE_NAME = {"description_width": "initial"}  # a slider's name is not cut off


def choice(name: str, values, value=None) -> widgets.SelectionSlider:
    """A slider over some values; default: it stands on the second of them."""
    value = values[1] if value is None else value
    return widgets.SelectionSlider(
        options=values, value=value, description=name, continuous_update=False, style=WHOLE_NAME
    )


def ranks_slider(cluster, most: int | None = None) -> widgets.IntSlider:
    """A slider of ranks; default: up to twice as many as there are cores for them."""
    return widgets.IntSlider(
        value=min(2, cluster.n_workers),
        min=1,
        max=most or 2 * max(2, min(cluster.cores, cluster.n_workers)),
        description="Ranks",
        continuous_update=False,
        style=WHOLE_NAME,
    )


def workers_slider(cluster, most: int) -> widgets.IntSlider:
    """A slider of workers; it stands on those that run, and ends where the machine is full."""
    return widgets.IntSlider(
        value=cluster.n_workers,
        min=1,
        max=min(max(most, cluster.n_workers), cluster.max_workers),
        description="Workers",
        continuous_update=False,
        style=WHOLE_NAME,
    )


def _closed(figure) -> bytes:
    picture = png(figure)
    plt.close(figure)
    return picture
