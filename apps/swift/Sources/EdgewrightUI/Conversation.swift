import Edgewright
import Foundation
import Observation

/// What a screen shows of a model: how far loading is, the answer as it comes, what went wrong. All on the main thread.
@MainActor @Observable
public final class Conversation {
  public enum Phase: Equatable, Sendable {
    case closed
    case loading(String)
    case ready
    case answering
  }

  public private(set) var phase = Phase.closed
  public private(set) var answer = ""
  public private(set) var failure: String?
  /// Tokens a second, and how the answer ended.
  public private(set) var summary = ""
  private var model: Model?
  private var task: Task<Void, Never>?

  public init() {}

  /// Opens a model's folder; a second call does nothing.
  public func open(_ folder: URL, runtime: some Runtime, options: LoadOptions = LoadOptions()) async {
    guard phase == .closed else { return }
    phase = .loading("Opening")
    failure = nil
    do {
      model = try await Model.open(folder, runtime: runtime, options: options) { stage in
        Task { @MainActor [weak self] in self?.show(stage) }
      }
      phase = .ready
    } catch {
      failure = "\(error)"
      phase = .closed
    }
  }

  private func show(_ stage: LoadStage) {
    guard case .loading = phase else { return }
    switch stage {
    case .checking(let done, let all): phase = .loading("Checking \(100 * done / max(1, all)) %")
    case .compiling: phase = .loading("Compiling for this device; once, it can take minutes")
    case .opening(let graph): phase = .loading("Opening \(graph)")
    }
  }

  /// Answers a prompt. context: for a model that reads one first.
  public func send(_ prompt: String, context: String = "") {
    guard phase == .ready, let model else { return }
    (phase, answer, summary, failure) = (.answering, "", "", nil)
    task = Task { [weak self] in
      do {
        var options = GenerateOptions()
        if !context.isEmpty { options.memory = try await model.readContext(context) }
        options.onEnd = { [weak self] said in
          Task { @MainActor [weak self] in self?.summarize(said) }
        }
        for try await piece in model.generate(prompt, options) {
          self?.answer += piece
        }
      } catch is CancellationError {
      } catch {
        self?.failure = "\(error)"
      }
      self?.phase = .ready
    }
  }

  public func cancel() {
    task?.cancel()
  }

  /// Waits for the answer under way.
  public func finish() async {
    await task?.value
  }

  private func summarize(_ said: Answer) {
    let rate = said.seconds > 0 ? Double(said.tokens.count) / said.seconds : 0
    summary = "\(said.tokens.count) tokens, \(Int(rate.rounded())) a second, ended by: \(said.ending.rawValue)"
  }
}
