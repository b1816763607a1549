#if canImport(CoreML)
  import CoreML
  import Edgewright
  import Foundation

  @available(macOS 15, iOS 18, *)
  final class CoreMLRunner: GraphRunner {
    let name = "Core ML"
    /// A chunk of a model with recurrent states is computed at once, up to this many tokens.
    let mostTokens: Int
    private static let recurrentChunk = 64
    private let models: [String: MLModel]

    init(_ app: AppContract, _ models: [String: MLModel]) {
      self.models = models
      let recurrent = app.graphs.contains { $0.states.contains { $0.kind == "recurrent" } }
      mostTokens = recurrent ? CoreMLRunner.recurrentChunk : Int.max
    }

    func run(_ graph: Graph, _ inputs: [String: Tensor]) throws -> [String: Tensor] {
      let model = try model(graph.name)
      let made = try told("the model does not run") { try model.prediction(from: try features(model) { inputs[$0] }) }
      var results: [String: Tensor] = [:]
      for port in graph.outputs { results[port.name] = try output(made, port.name) }
      return results
    }

    func calls(_ graph: Graph, capacity: Int, held: [String: Tensor]) throws -> any GraphCalls {
      try CoreMLCalls(graph, try model(graph.name), models["\(graph.name)_step"], held)
    }

    private func model(_ function: String) throws -> MLModel {
      guard let found = models[function] else {
        throw EdgewrightError("the package has no function \(function); export the bundle again")
      }
      return found
    }
  }

  /// Caches are Core ML's own state, which both functions of a graph write; recurrent states go in and come out.
  @available(macOS 15, iOS 18, *)
  final class CoreMLCalls: GraphCalls {
    private let model: MLModel
    private let step: MLModel?
    private let state: MLState
    private let held: [String: Tensor]
    private var carried: [String: Tensor] = [:]

    init(_ graph: Graph, _ model: MLModel, _ step: MLModel?, _ held: [String: Tensor]) throws {
      (self.model, self.step, state) = (model, step, model.makeState())
      let inputs = model.modelDescription.inputDescriptionsByName
      for port in graph.states where port.updated == true {
        guard let shape = inputs[port.name]?.multiArrayConstraint?.shape else { continue }
        carried[port.name] = try Tensor(zeros: .float32, shape.map(\.intValue))
      }
      self.held = try held.mapValues { try Tensor(copying: try multiArray($0, $0.type == .float32 ? .float16 : nil)) }
    }

    func run(_ inputs: [String: Tensor], into outputs: [String: Tensor]) throws {
      let one = inputs["input_ids"]?.count == 1 && (inputs["logit_positions"].map { $0.count == 1 } ?? true)
      let model = one ? step ?? model : model
      let made = try told("the model does not run") {
        try model.prediction(from: try features(model) { inputs[$0] ?? carried[$0] ?? held[$0] }, using: state)
      }
      for name in carried.keys { carried[name] = try output(made, "\(name)_out") }
      for (name, tensor) in outputs {
        let values = try output(made, name).floats()
        guard values.count == tensor.count else {
          throw EdgewrightError(
            "the package gives \(values.count) numbers of \(name), not \(tensor.count); export the bundle again")
        }
        _ = tensor.values(Float.self).update(from: values)
      }
    }
  }

  /// The inputs that a function asks for, in its own types.
  @available(macOS 15, iOS 18, *)
  private func features(_ model: MLModel, _ named: (String) -> Tensor?) throws -> MLDictionaryFeatureProvider {
    var given: [String: Any] = [:]
    for (name, description) in model.modelDescription.inputDescriptionsByName {
      guard let tensor = named(name) else {
        throw EdgewrightError("the package wants \(name), which this client does not give; export the bundle again")
      }
      given[name] = try multiArray(tensor, description.multiArrayConstraint?.dataType)
    }
    return try MLDictionaryFeatureProvider(dictionary: given)
  }

  /// A tensor's numbers as Core ML holds them. type: nil keeps the tensor's, integers and flags being int32.
  private func multiArray(_ tensor: Tensor, _ type: MLMultiArrayDataType?) throws -> MLMultiArray {
    let own: MLMultiArrayDataType =
      switch tensor.type {
      case .float32: .float32
      case .float16: .float16
      default: .int32
      }
    let array = try MLMultiArray(shape: tensor.shape.map { NSNumber(value: $0) }, dataType: type ?? own)
    array.withUnsafeMutableBytes { bytes, _ in  // just made: without gaps
      switch type ?? own {
      case .float32:
        _ = bytes.bindMemory(to: Float.self).update(from: tensor.floats())
      case .float16 where tensor.type == .float16:
        bytes.copyMemory(from: UnsafeRawBufferPointer(start: tensor.data, count: tensor.count * 2))
      case .float16:
        _ = bytes.bindMemory(to: UInt16.self).update(from: tensor.floats().map(Half.bits))
      default:
        _ = bytes.bindMemory(to: Int32.self).update(from: tensor.integers().map { Int32(clamping: $0) })
      }
    }
    return array
  }

  private func output(_ made: any MLFeatureProvider, _ name: String) throws -> Tensor {
    guard let array = made.featureValue(for: name)?.multiArrayValue else {
      throw EdgewrightError("the package does not give \(name); export the bundle again")
    }
    return try Tensor(copying: array)
  }

  extension Tensor {
    /// A copy of Core ML's numbers, without the gaps that its strides may leave.
    fileprivate convenience init(copying array: MLMultiArray) throws {
      let type: ElementType =
        switch array.dataType {
        case .float16: .float16
        case .float32: .float32
        case .int32: .int32
        default:
          throw EdgewrightError("the package gives numbers of a type that this client does not know; export the bundle again")
        }
      let (shape, strides) = (array.shape.map(\.intValue), array.strides.map(\.intValue))
      try self.init(zeros: type, shape)
      let (size, place) = (type.bytes, data)
      let row = shape.last ?? 1
      array.withUnsafeBytes { bytes in
        guard let from = bytes.baseAddress else { return }
        for first in stride(from: 0, to: count, by: max(1, row)) {
          var (left, offset) = (first, 0)
          for axis in shape.indices.reversed() {
            offset += left % shape[axis] * strides[axis]
            left /= shape[axis]
          }
          for i in 0..<row {
            place.advanced(by: (first + i) * size).copyMemory(
              from: from.advanced(by: (offset + i * (strides.last ?? 1)) * size), byteCount: size)
          }
        }
      }
    }
  }
#endif
