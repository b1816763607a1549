import COnnxRuntime
import Edgewright
import Foundation

final class OnnxRunner: GraphRunner {
  let name: String
  let mostTokens = Int.max
  private let api: Api
  private let sessions: [String: Session]

  init(_ api: Api, _ sessions: [String: Session]) {
    (self.api, self.sessions) = (api, sessions)
    name = "ONNX Runtime \(api.version)"
  }

  func run(_ graph: Graph, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
    let values = try graph.inputs.map { try Value(api, try OnnxRunner.named($0.name, in: inputs)) }
    let wanted = graph.outputs.map(\.name)
    var made = [OpaquePointer?](repeating: nil, count: wanted.count)
    let given: [OpaquePointer?] = values.map(\.pointer)
    let status = withCStrings(graph.inputs.map(\.name)) { names in
      withCStrings(wanted) { outputs in
        api.table.pointee.Run(
          sessions[graph.name]?.pointer, nil, names, given, given.count, outputs, wanted.count, &made)
      }
    }
    withExtendedLifetime(values) {}
    try api.check(status, "the model does not run")
    var results: [String: Tensor] = [:]
    var failure: (any Error)?
    for (name, pointer) in zip(wanted, made) {
      guard let pointer else { continue }
      do {
        results[name] = try Value.taken(api, pointer)
      } catch {
        failure = error
      }
    }
    if let failure { throw failure }
    return results
  }

  func calls(_ graph: Graph, capacity: Int, held: [String: Tensor]) throws -> any GraphCalls {
    guard let session = sessions[graph.name] else {
      throw EdgewrightError("app.json has no graph \(graph.name); embed the bundle again")
    }
    return try OnnxCalls(api, session, graph, capacity, held)
  }

  static func named(_ name: String, in tensors: [String: Tensor]) throws -> Tensor {
    guard let found = tensors[name] else {
      throw EdgewrightError("the model wants \(name), which this client does not give; embed the bundle again")
    }
    return found
  }
}

/// A KV cache is one buffer, written in place; other states have two that change places.
final class OnnxCalls: GraphCalls {
  private let api: Api
  private let session: Session
  private let graph: Graph
  private var bindings: [OpaquePointer] = []
  private var next = 0
  private var states: [Value] = []
  private var bound: [String: Value] = [:]

  init(_ api: Api, _ session: Session, _ graph: Graph, _ capacity: Int, _ held: [String: Tensor]) throws {
    (self.api, self.session, self.graph) = (api, session, graph)
    let swaps = graph.states.contains { $0.updated == true && $0.kind != "kv" }
    for _ in 0..<(swaps ? 2 : 1) {
      var made: OpaquePointer?
      try api.check(api.table.pointee.CreateIoBinding(session.pointer, &made), "ONNX Runtime")
      if let made { bindings.append(made) }
    }
    for state in graph.states {
      guard state.updated == true else {
        try bind(input: state.name, try OnnxRunner.named(state.name, in: held))
        continue
      }
      let one = try zeros(state, capacity)
      let two = state.kind == "kv" ? one : try zeros(state, capacity)
      for (i, binding) in bindings.enumerated() {
        let (from, to) = i == 0 ? (one, two) : (two, one)
        try api.check(api.table.pointee.BindInput(binding, state.name, from.pointer), state.name)
        try api.check(api.table.pointee.BindOutput(binding, "\(state.name)_out", to.pointer), state.name)
      }
    }
    for (name, tensor) in held where graph.reads(name) { try bind(input: name, tensor) }
  }

  deinit {
    for binding in bindings { api.table.pointee.ReleaseIoBinding(binding) }
  }

  func run(_ inputs: [String: Tensor], into outputs: [String: Tensor]) throws {
    for (name, tensor) in inputs where bound[name]?.tensor !== tensor { try bind(input: name, tensor) }
    for (name, tensor) in outputs where bound[name]?.tensor !== tensor {
      let value = try Value(api, tensor)
      for binding in bindings { try api.check(api.table.pointee.BindOutput(binding, name, value.pointer), name) }
      bound[name] = value
    }
    try api.check(api.table.pointee.RunWithBinding(session.pointer, nil, bindings[next]), "the model does not run")
    next = (next + 1) % bindings.count
  }

  private func zeros(_ state: GraphPort, _ capacity: Int) throws -> Value {
    let value = try Value(api, try Tensor(zeros: state.dtype, state.sized(capacity)))
    states.append(value)
    return value
  }

  private func bind(input name: String, _ tensor: Tensor) throws {
    let value = try Value(api, tensor)
    for binding in bindings { try api.check(api.table.pointee.BindInput(binding, name, value.pointer), name) }
    bound[name] = value
  }
}

/// Texts as C's, for the time of a call.
private func withCStrings<Result>(_ texts: [String], _ body: ([UnsafePointer<CChar>?]) -> Result) -> Result {
  let copies = texts.map { strdup($0) }
  defer {
    for copy in copies { free(copy) }
  }
  return body(copies.map { UnsafePointer($0) })
}
