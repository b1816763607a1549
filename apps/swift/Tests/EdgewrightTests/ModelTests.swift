import EdgewrightONNX
import EdgewrightUI
import Foundation
import XCTest

@testable import Edgewright

/// The model of this package by ONNX Runtime. EDGEWRIGHT_MODEL names another folder.
final class ModelTests: XCTestCase {
  private static let folder: URL = {
    if let named = ProcessInfo.processInfo.environment["EDGEWRIGHT_MODEL"] { return URL(fileURLWithPath: named) }
    return URL(fileURLWithPath: #filePath).appendingPathComponent("../../../model").standardizedFileURL
  }()

  private func open() async throws -> Model {
    try await Model.open(ModelTests.folder, runtime: OnnxRuntime(threads: 1))
  }

  private func traces() throws -> Traces {
    try Traces(contentsOf: ModelTests.folder.appendingPathComponent("traces.json"))
  }

  /// A prompt of the traces, with its memory, and options for as many tokens as were recorded.
  private func recorded(_ model: Model) async throws -> (one: Traces.Case, options: GenerateOptions) {
    let traces = try traces()
    let one = try XCTUnwrap(traces.cases.first)
    var options = GenerateOptions()
    options.maxNewTokens = traces.newTokens
    options.sampling = .greedy
    if !one.context.isEmpty { options.memory = try await model.readContext(one.context) }
    return (one, options)
  }

  private func failure(_ body: () async throws -> Void) async -> String {
    do {
      try await body()
      return "nothing went wrong"
    } catch {
      return "\(error)"
    }
  }

  func testTheGoldenTracesPass() async throws {
    let report = try await open().check(try traces())
    XCTAssertEqual(report.failures, [])
    XCTAssertGreaterThan(report.cases, 0)
  }

  func testPiecesAddUpToTheAnswer() async throws {
    let model = try await open()
    let (one, options) = try await recorded(model)
    let whole = try await model.answer(one.ids, options)
    var text = ""
    for try await piece in model.generate(one.ids, options) { text += piece }
    XCTAssertEqual(chars(text), chars(whole.text))
    XCTAssertEqual(whole.promptTokens, one.ids.count)
  }

  func testASecondCallIsRefusedAndACancelledOneEnds() async throws {
    let model = try await open()
    let (one, options) = try await recorded(model)
    let (reading, cancelled) = (DispatchSemaphore(value: 0), DispatchSemaphore(value: 0))
    let task = Task {
      try await model.withStream(one.ids, newTokens: 4, memory: options.memory) { stream in
        _ = try stream.prefill()
        reading.signal()
        cancelled.wait()
        _ = try stream.feed(one.steps[0].token)
      }
    }
    await withCheckedContinuation { (done: CheckedContinuation<Void, Never>) in
      DispatchQueue.global().async {
        reading.wait()
        done.resume()
      }
    }
    let refusal = await failure { _ = try await model.answer(one.ids, options) }
    XCTAssertTrue(refusal.hasPrefix("the model is answering already"), refusal)
    let streamed = await failure { for try await _ in model.generate(one.ids, options) {} }
    XCTAssertEqual(streamed, refusal)
    task.cancel()
    let next = Task { try await model.answer(one.ids, options) }  // waits for the cancelled one
    cancelled.signal()
    let ended = await failure { try await task.value }
    XCTAssertEqual(ended, "\(CancellationError())")
    let tokens = try await next.value.tokens
    XCTAssertEqual(tokens.first, one.steps.first { !model.app.stops.tokens.contains($0.token) }?.token)
  }

  func testACancelledTaskEndsItsText() async throws {
    let model = try await open()
    let (one, options) = try await recorded(model)
    let task = Task {
      for try await _ in model.generate(one.ids, options) {}
    }
    task.cancel()
    _ = await task.result
    let again = try await model.answer(one.ids, options)
    XCTAssertEqual(again.promptTokens, one.ids.count)
  }

  func testAContextThatIsFullIsSaid() async throws {
    let model = try await open()
    let (one, options) = try await recorded(model)
    let most = model.app.maxContext
    let long = [Token](repeating: one.ids[0], count: most + 1)
    let line = await failure { _ = try await model.answer(long, options) }
    XCTAssertTrue(line.contains("shorten it"), line)
    let over = await failure {
      try await model.withStream(one.ids, newTokens: 1, memory: options.memory) { stream in
        _ = try stream.prefill()
        for _ in 0...most { _ = try stream.feed(one.steps[0].token) }
      }
    }
    XCTAssertTrue(over.contains("do not fit the context of"), over)
  }

  func testAScreenFollowsAnAnswer() async {
    await ModelTests.followAnAnswer()
  }

  @MainActor
  private static func followAnAnswer() async {
    let conversation = Conversation()
    await conversation.open(ModelTests.folder, runtime: OnnxRuntime(threads: 1))
    XCTAssertEqual(conversation.phase, .ready)
    XCTAssertNil(conversation.failure)
    conversation.send("a", context: "")
    XCTAssertEqual(conversation.phase, .answering)
    conversation.send("b")  // one at a time
    await conversation.finish()
    XCTAssertEqual(conversation.phase, .ready)
    let missing = Conversation()
    await missing.open(ModelTests.folder.appendingPathComponent("none"), runtime: OnnxRuntime())
    XCTAssertEqual(missing.phase, .closed)
    XCTAssertTrue(missing.failure?.contains("app.json is missing") ?? false)
  }
}
