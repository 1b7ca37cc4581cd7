// <clip-wall>: canvases that show parts of one video, so that all play in step, and a wipe between two of them.
// Everything inside may be exchanged while it is on the page, so it is looked up at every frame.
class ClipWall extends HTMLElement {
  connectedCallback() {
    this.onclick = (event) => {
      if (event.target.tagName === "BUTTON") this.held = !this.held;
    };
    const frame = () => {
      if (!this.isConnected) return;
      this.show(this.querySelector("video, img"));
      requestAnimationFrame(frame);
    };
    frame();
  }

  show(source) {
    const button = this.querySelector("button");
    if (source.tagName === "VIDEO") {
      button.textContent = this.held ? "play" : "pause";
      if (this.held) source.pause();
      else if (source.paused) source.play().catch(() => {});
    } else {
      button.hidden = true;
    }
    const width = (source.videoWidth || source.naturalWidth) / Number(source.dataset.columns);
    const height = (source.videoHeight || source.naturalHeight) / 2;
    if (!(width > 0 && height > 0) || source.readyState < 2) return;
    for (const canvas of this.querySelectorAll("canvas")) this.draw(canvas, source, Math.floor(width), Math.floor(height));
  }

  draw(canvas, source, width, height) {
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    const context = canvas.getContext("2d");
    const part = (column, row, from, to) => {
      if (to > from) context.drawImage(source, column * width + from, row * height, to - from, height, from, 0, to - from, height);
    };
    if (canvas.dataset.wipe === undefined) {
      part(Number(canvas.dataset.column), Number(canvas.dataset.row), 0, width);
      return;
    }
    const edge = Math.round((width * Number(this.querySelector("input").value)) / 100);
    part(0, 0, 0, edge);
    part(Number(canvas.dataset.wipe), 0, edge, width);
    context.fillStyle = "#fff";
    context.fillRect(edge - 1, 0, 2, height);
  }
}
if (!customElements.get("clip-wall")) customElements.define("clip-wall", ClipWall);
