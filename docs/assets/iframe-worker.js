// Pages opened from disk may not start a web worker, which the search is; a hidden frame stands in for it.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow, script = frame.contentDocument.createElement("script");
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      this.tell = data => inside.dispatchEvent(new MessageEvent("message", { data }));
      this.waiting = [];
      script.src = url;
      script.onload = () => { this.waiting.forEach(this.tell); this.waiting = null; };
      frame.contentDocument.body.append(script);
    }
    postMessage(data) { this.waiting ? this.waiting.push(data) : this.tell(data); }
    terminate() {}
  };
}
