import Foundation

/// Golden traces: what the bundle itself answered, step by step.
public struct Traces: Decodable, Sendable {
  struct Step: Decodable, Sendable {
    let token: Token
    /// (token, logit) of the largest, the largest first.
    let top: [[Double]]
  }
  struct Case: Decodable, Sendable {
    let ids: [Token]
    let context: [Token]
    let steps: [Step]
    let ending: String
    let text: String?
  }
  struct TextCase: Decodable, Sendable {
    let text: String
    let ids: [Token]
    let decoded: String
  }
  let newTokens: Int
  let tolerance: Double
  let cases: [Case]
  let texts: [TextCase]

  public init(contentsOf file: URL) throws {
    do {
      let decoder = JSONDecoder()
      decoder.keyDecodingStrategy = .convertFromSnakeCase
      self = try decoder.decode(Traces.self, from: try Files.read(file))
    } catch is DecodingError {
      throw EdgewrightError("\(file.path) holds no traces; embed the bundle again")
    }
  }
}

/// What the check of golden traces found. failures: a line each.
public struct TraceReport: Sendable {
  public var cases = 0
  public var casesRight = 0
  public var texts = 0
  public var textsRight = 0
  public var failures: [String] = []
  public var largestDifference = 0.0

  public var passed: Bool { failures.isEmpty }
}

extension Model {
  /// Feeds the recorded tokens; the best token of each step must be the recorded one, or nearly as good by the recording.
  public func check(_ traces: Traces) async throws -> TraceReport {
    var report = TraceReport()
    for (number, one) in traces.cases.enumerated() {
      let memory: Memory? = try await one.context.isEmpty ? nil : readContext(one.context)
      let (failure, largest) = try await withStream(one.ids, newTokens: traces.newTokens, memory: memory) { stream in
        try Model.follow(one, stream, traces.tolerance)
      }
      var faults = failure.map { ["trace \(number), \($0)"] } ?? []
      report.largestDifference = max(report.largestDifference, largest)
      let said = one.steps.map(\.token).dropLast(one.ending == "end" ? 1 : 0)
      if let text = one.text, let ours = try? self.text(of: Array(said)), chars(ours) != chars(text) {
        faults.append("trace \(number): the text is \(ours.debugDescription), recorded \(text.debugDescription)")
      }
      report.cases += 1
      report.casesRight += faults.isEmpty ? 1 : 0
      report.failures += faults
    }
    for one in traces.texts {
      report.texts += 1
      let ids = try tokens(of: one.text)
      let back = try text(of: one.ids)
      if ids == one.ids, chars(back) == chars(one.decoded) {
        report.textsRight += 1
      } else {
        report.failures.append(
          "text \(one.text.debugDescription): tokens \(ids), recorded \(one.ids); text \(back.debugDescription), "
            + "recorded \(one.decoded.debugDescription)")
      }
    }
    return report
  }

  private static func follow(_ one: Traces.Case, _ stream: TokenStream, _ tolerance: Double) throws -> (String?, Double) {
    var logits = try stream.prefill()
    var largest = 0.0
    for (i, step) in one.steps.enumerated() {
      guard let first = step.top.first?.last, let last = step.top.last?.last else { return ("step \(i) has no logits", largest) }
      let ours = best(logits)
      var margin = first - last  // at least
      for entry in step.top where entry.count == 2 && logits.indices.contains(Int(entry[0])) {
        largest = max(largest, abs(Double(logits[Int(entry[0])]) - entry[1]))
        if Int(entry[0]) == ours { margin = first - entry[1] }
      }
      if ours != step.token, margin > tolerance {
        return ("step \(i): token \(ours), recorded \(step.token) (margin \(margin))", largest)
      }
      if i + 1 < one.steps.count { logits = try stream.feed(step.token) }
    }
    return (nil, largest)
  }
}
